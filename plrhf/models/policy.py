"""The personalised policy, learned by direct preference optimisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plrhf.core import losses
from plrhf.core.errors import bad_value
from plrhf.core.logprobs import response_logps
from plrhf.core.types import PreferenceBatch
from plrhf.models.base import PersonalModule


class PersonalDPOPolicy(PersonalModule):
    """pi(y | x, u), tied to a reference that never sees the user (arXiv 2402.05133, P-DPO).

    Margins are beta * (log-ratio of chosen - log-ratio of rejected), in nats. The reference is the
    same backbone with its adapters off: no second model in memory.

    Args:
        beta: tie to the reference, > 0. loss: one of `losses.DPO_LOSSES`.
        label_smoothing: for ``cdpo``, in [0, .5). parts: see `PersonalModule`.

    Raises:
        ValueError: a backbone that is not causal, or has no frozen weights to serve as reference.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss: str = "sigmoid",
        label_smoothing: float = 0.0,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        if not beta > 0:
            raise bad_value("model.beta", beta, "a number above 0", "Set model.beta=0.1")
        if loss not in losses.DPO_LOSSES:
            allowed = ", ".join(losses.DPO_LOSSES)
            raise bad_value("model.loss", loss, f"one of {allowed}", "Set model.loss=sigmoid")
        if not 0 <= label_smoothing < 0.5:
            raise bad_value(
                "model.label_smoothing",
                label_smoothing,
                "a number from 0 to below .5",
                "Set model.label_smoothing=0",
            )
        if not self.backbone.causal:
            raise bad_value(
                "backbone.path",
                self.backbone.config.model_type,
                "a causal language model",
                "Use a causal backbone, or model=reward",
            )
        if not self.aggregator.unembeddable:
            raise bad_value(
                "aggregator.layer_width",
                self.aggregator.output_size,
                "null for a policy",
                "Set aggregator.layer_width=null",
            )
        if self.backbone.trainable == "full":
            raise bad_value(
                "backbone.trainable",
                "full",
                "lora or frozen, as the reference is the model without its adapters",
                "Set backbone.trainable=lora",
            )
        self.beta, self.dpo_loss, self.label_smoothing = beta, loss, label_smoothing

    def logps(self, hidden: Tensor, batch: PreferenceBatch) -> Tensor:
        """Hidden states [R, L, d] -> response log-probabilities [B, 2] float32, in nats."""
        return response_logps(
            hidden,
            batch.input_ids,
            batch.segment,
            self.backbone.unembed,
            n_pairs=len(batch),
            constant=self.backbone.unembeds_alike,
        )

    def reference_logps(self, batch: PreferenceBatch) -> Tensor:
        """Response log-probabilities [B, 2] under the reference, in nats, no gradient."""
        with self.backbone.reference():
            inputs = self.backbone.embed(batch.input_ids)
            hidden = self.backbone(inputs, batch.segment, batch.position_ids)
            return self.logps(hidden, batch)

    def margins(self, hidden: Tensor, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        reference = self.reference_logps(batch) if batch.ref_logps is None else batch.ref_logps
        logits = torch.stack(
            [losses.dpo_logits(self.logps(of_context, batch), reference) for of_context in hidden]
        )  # [C, B]
        return self.beta * logits, logits

    def pair_loss(self, margins: Tensor, extra: Tensor) -> Tensor:
        return losses.dpo(
            extra, beta=self.beta, loss=self.dpo_loss, label_smoothing=self.label_smoothing
        )
