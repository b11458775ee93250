"""Supervised fine-tuning, which gives the policy that preference learning starts from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor

from plrhf.backbone.model import Backbone
from plrhf.backbone.saving import without_frozen
from plrhf.core.checks import check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.logprobs import response_logps
from plrhf.core.row_index import RowIndex
from plrhf.core.row_packing import RowPacking
from plrhf.core.types import CHOSEN, PADDING, REJECTED, PreferenceBatch
from plrhf.models.metrics import ExactMean
from plrhf.models.optim import Optim


@check_arguments("model")
class SupervisedPolicy(LightningModule):
    """Learns to generate responses by next-token likelihood, without users.

    Args:
        backbone: a causal one. optim: `lr`, decay, schedule.
        responses: train on ``both`` responses of a pair, or on the ``chosen`` one only.
    """

    def __init__(
        self, *, backbone: Backbone, optim: Optim, responses: Literal["chosen", "both"] = "chosen"
    ) -> None:
        super().__init__()
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
        """Compute the mean negative log-likelihood of response tokens, in nats.

        Averaged over processes, it is the mean over the tokens of the whole batch.
        """
        total, n_tokens = self.total_nll(batch)
        return total / self._mean_over_processes(n_tokens)

    def on_before_batch_transfer(
        self, batch: PreferenceBatch, dataloader_idx: int
    ) -> PreferenceBatch:
        """Mask what is not trained on, and pack the rows again, which are shorter without it."""
        if self.responses == "both" and batch.weight is None:
            return batch  # all is trained on, and the loader has packed it
        segment = batch.segment
        if self.responses == "chosen":
            segment = segment.masked_fill(segment == REJECTED, PADDING)
        counted = batch.counted().repeat(len(segment) // len(batch))  # of each row
        segment = segment.masked_fill(~counted[:, None], PADDING)
        packing = RowPacking.of(segment) if self.backbone.layout == "packed" else None
        return replace(batch, segment=segment, packing=packing, index=RowIndex.of(segment))

    def total_nll(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Sum the negative log-likelihood of this process's response tokens, and count the tokens.

        Args:
            batch: as returned by `on_before_batch_transfer`.

        Returns:
            0-dim tensors: the sum in nats, and the count.
        """
        hidden, segment = self.backbone.read_text(batch), batch.segment
        logps = response_logps(
            hidden,
            batch.input_ids,
            segment,
            self.backbone.unembed,
            n_pairs=len(batch),
            constant=self.backbone.unembedding_is_constant,
            index=batch.index,
        )
        n_tokens = ((segment == CHOSEN) | (segment == REJECTED)).sum()
        return -logps.sum(), n_tokens

    def _mean_over_processes(self, count: Tensor) -> Tensor:
        """Average a count over all processes."""
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
        self.val_loss.update(*self.total_nll(batch))  # over tokens, whatever the batches are

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss.compute().float(), prog_bar=True)
        self.val_loss.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only learned weights."""
        checkpoint["state_dict"] = without_frozen(self, checkpoint["state_dict"])

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.optim.build(
            backbone=self.backbone.parameters(),
            user=(),
            head=(),
            total_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
