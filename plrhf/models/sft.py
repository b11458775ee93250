"""Supervised fine-tuning: the policy that preference learning starts from."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from plrhf.backbone.model import Backbone
from plrhf.core.errors import bad_value
from plrhf.core.logprobs import response_logps
from plrhf.core.types import CHOSEN, PADDING, REJECTED, PreferenceBatch
from plrhf.models.metrics import ExactMean
from plrhf.models.optim import Optim


class SupervisedPolicy(LightningModule):
    """Next-token likelihood of responses given their prompts, no user.

    Args:
        backbone: a causal one. optim: `lr`, decay, schedule.
        responses: learn from ``both`` responses of a pair, or from the ``chosen`` only.
    """

    def __init__(self, *, backbone: Backbone, optim: Optim, responses: str = "chosen") -> None:
        super().__init__()
        if responses not in ("both", "chosen"):
            raise bad_value(
                "model.responses", responses, "both or chosen", "Set model.responses=chosen"
            )
        if not backbone.causal:
            raise bad_value(
                "backbone.path",
                backbone.config.model_type,
                "a causal language model",
                "Use a causal backbone",
            )
        self.backbone, self.optim, self.responses = backbone, optim, responses
        self.strict_loading = False  # checkpoints leave out frozen weights
        self.val_loss = ExactMean()

    def nll(self, batch: PreferenceBatch) -> Tensor:
        """Negative log-likelihood a response token, in nats, over all tokens of the batch."""
        segment = batch.segment
        if self.responses == "chosen":
            segment = segment.masked_fill(segment == REJECTED, PADDING)
        segment = segment.masked_fill(~batch.counted()[:, None], PADDING)
        hidden = self.backbone(self.backbone.embed(batch.input_ids), segment, batch.position_ids)
        logps = response_logps(
            hidden,
            batch.input_ids,
            segment,
            self.backbone.unembed,
            n_pairs=len(batch),
            constant=self.backbone.unembeds_alike,
        )
        n_tokens = ((segment == CHOSEN) | (segment == REJECTED)).sum()
        return -logps.sum() / self._mean_over_processes(n_tokens)

    def _mean_over_processes(self, count: Tensor) -> Tensor:
        """A count of this process's share as what processes have on average."""
        if self._trainer is None:
            return count
        mean: Any = self.trainer.strategy.reduce(count.float(), reduce_op="mean")
        return mean

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        loss = self.nll(batch)
        self.log(  # loggers are told by `training.StepMetrics`
            "train/loss", loss, prog_bar=True, logger=False, batch_size=len(batch), sync_dist=True
        )
        return loss

    @torch.no_grad()
    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        n_pairs = self._mean_over_processes(batch.counted().sum())
        self.val_loss.update(self.nll(batch), n_pairs)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss.compute().float(), prog_bar=True)
        self.val_loss.reset()

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.optim.build(
            backbone=self.backbone.parameters(),
            user=(),
            head=(),
            total_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
