"""The personalised policy, and its training by direct preference optimisation (DPO)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from plrhf.aggregators import FiLM
from plrhf.backbone.precision import unembed_in_float32
from plrhf.core import losses
from plrhf.core.checks import PositiveFloat, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.logprobs import sum_by_response, token_logps
from plrhf.core.types import PreferenceBatch
from plrhf.data.rows import Ties
from plrhf.models.answers import answer_losses, refuse_choices, tie_parameter
from plrhf.models.base import PersonalModule
from plrhf.models.inference import Asked, write


@check_arguments("model")
class PersonalPolicy(PersonalModule):
    """Generates text for a user, pi(y | x, u).

    The reference is the same backbone with its adapters off, so there is no second model in memory. It
    has no users. The margin of a pair is its implicit reward difference, beta * (log-ratio of chosen -
    log-ratio of rejected), in nats (Rafailov et al. 2023, arXiv 2305.18290).

    Args:
        beta: how strongly the policy is tied to the reference. parts: see `PersonalModule`.

    Attributes:
        learns_from_pairs: whether training reads the log-probabilities of the train pairs' responses.

    Raises:
        ValueError: the backbone is not causal, has no frozen weights to serve as reference, or nothing
            can be learned.
    """

    learns_from_pairs = True

    def __init__(self, *, beta: PositiveFloat = 0.1, **parts: Any) -> None:
        super().__init__(**parts)
        self.beta = beta
        self._check_parts()

    def _check_parts(self) -> None:
        """Raise a ValueError if the parts do not form a policy that can learn."""
        if not self.backbone.causal:
            raise bad_value(
                "backbone.path",
                self.backbone.config.model_type,
                "a causal language model",
                "Use a causal backbone, or model=reward",
            )
        if self.aggregator.residual is not None:
            allowed = "false for a policy, which writes texts that nobody has judged"
            cure = "Set aggregator.text_residual=false"
            raise bad_value("aggregator.text_residual", True, allowed, cure)
        if not self.aggregator.unembeddable:
            raise bad_value(
                "aggregator.layer_width",
                self.aggregator.output_size,
                "null for a policy",
                "Set aggregator.layer_width=null",
            )
        if self.has_user_vectors and not self.aggregator.user_acts:
            raise bad_value(
                "aggregator",
                type(self.aggregator).__name__,
                "one in which users act, as a policy has no reward head",
                "Set aggregator=film, or encoder=none",
            )
        if self.backbone.trainable == "full":
            raise bad_value(
                "backbone.trainable",
                "full",
                "lora or frozen, as the reference is the model without its adapters",
                "Set backbone.trainable=lora",
            )
        if not any(one.requires_grad for one in self.parameters()):
            raise bad_value(
                "backbone.trainable",
                self.backbone.trainable,
                "lora, as with encoder=none a frozen policy has nothing to learn",
                "Set backbone.trainable=lora, or encoder=lookup",
            )

    def write(self, asked: Asked, **how: Any) -> list[str]:
        """Generate texts for users; see `inference.write`."""
        return write(self, asked, **how)

    def values_without_user(self) -> dict[str, Callable[[PreferenceBatch], Tensor]]:
        return {"ref_logps": self.reference_logps}

    def without_user(self, batch: PreferenceBatch) -> PreferenceBatch:
        if not self.aggregator.after_trunk:
            return super().without_user(batch)
        if batch.trunk is not None:
            return batch
        return replace(batch, trunk=self.trunk(batch))

    @property
    def head_in_float32(self) -> bool:
        """Whether logits are computed in float32 although the model computes in a narrower dtype.

        This is so if the user acts on the last hidden states, for the reference too. Otherwise the
        rounding of logits would hide the user's effect on log-ratios.
        """
        is_mixed = torch.is_autocast_enabled(self.device.type)
        is_narrow = is_mixed or self.backbone.embedding_dtype != torch.float32
        return self.aggregator.after_trunk and is_narrow

    def logps(self, hidden: Tensor, batch: PreferenceBatch) -> Tensor:
        """Compute response log-probabilities [B, 2] float32, in nats, from hidden states [R, L, d]."""
        return sum_by_response(self.token_logps(hidden, batch), batch.segment, len(batch))

    def token_logps(self, hidden: Tensor, batch: PreferenceBatch) -> Tensor:
        """Compute the log-probability of each response token, [R, L] float32 in nats, 0 elsewhere."""
        wide = self.head_in_float32
        return token_logps(
            hidden.float() if wide else hidden,
            batch.input_ids,
            batch.segment,
            unembed_in_float32(self.backbone) if wide else self.backbone.unembed,
            constant=self.backbone.unembedding_is_constant,
            index=batch.index,
        )

    def reference_logps(self, batch: PreferenceBatch) -> Tensor:
        """Compute response log-probabilities [B, 2] of the reference, in nats, without gradient."""
        with self.backbone.reference():
            return self.logps(self.trunk(batch), batch)

    def trunk(self, batch: PreferenceBatch) -> Tensor:
        """Compute the last hidden states of the text alone, [R, L, d]."""
        return self.backbone.read_text(batch)

    def margins(
        self, hidden: Tensor, batch: PreferenceBatch, user: Tensor
    ) -> tuple[Tensor, Tensor]:
        reference = self.reference_logps(batch) if batch.ref_logps is None else batch.ref_logps
        logits = torch.stack(
            [losses.dpo_logits(self.logps(of_context, batch), reference) for of_context in hidden]
        )  # [C, B]
        return self.beta * logits, logits


@check_arguments("model")
class PersonalDPOPolicy(PersonalPolicy):
    """Learns a policy from pairs by P-DPO of arXiv 2402.05133.

    Choices among several responses, such as rankings, have Plackett and Luce's likelihood of the implicit
    rewards (arXiv 2305.18290, appendix A.3).

    Args:
        loss: see `losses.dpo`. label_smoothing: probability that a choice is flipped, for ``cdpo`` only.
        ties: whether ties are learned from, as by `PersonalRewardModel`, with implicit rewards as rewards.
        first_order: learn from log-ratios to first order in the users' scale and shift, around the
            reference. They need no text but the gradients of each response's log-probability, which
            are computed once, so an epoch takes as long as a reward model's on frozen features. With
            backbone.trainable=frozen and aggregator=film only.
        policy: see `PersonalPolicy`.
    """

    def __init__(
        self,
        *,
        loss: Literal["sigmoid", "ipo", "hinge", "cdpo"] = "sigmoid",
        label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0,
        ties: Ties = "none",
        first_order: bool = False,
        **policy: Any,
    ) -> None:
        super().__init__(**policy)
        if label_smoothing > 0 and loss != "cdpo":
            raise bad_value(
                "model.label_smoothing",
                label_smoothing,
                f"0 with model.loss={loss}, which does not use it",
                "Set model.loss=cdpo, or model.label_smoothing=0",
            )
        self.dpo_loss, self.label_smoothing, self.first_order = loss, label_smoothing, first_order
        if self.first_order and not self._is_first_order_possible():
            raise bad_value(
                "model.first_order",
                True,
                "false, unless users alone are learned and act by FiLM",
                "Set backbone.trainable=frozen aggregator=film, and an encoder that reads no pairs",
            )

        self.log_tie = tie_parameter(ties, self.encoder, user_dim=self.aggregator.user_dim)
        if self.log_tie is not None and (loss != "sigmoid" or self.encoder.reads_context):
            allowed = "none with another loss than sigmoid, or with an encoder that reads pairs"
            raise bad_value("model.ties", ties, allowed, "Set model.ties=none")

    def head_parameters(self) -> list[nn.Parameter]:
        return [] if self.log_tie is None else [*self.log_tie.parameters()]

    def _is_first_order_possible(self) -> bool:
        """Return whether log-ratios depend on what FiLM is given alone, and not on learned weights."""
        is_frozen = self.backbone.trainable == "frozen" and not self.encoder.reads_context
        return is_frozen and isinstance(self.aggregator, FiLM)

    @property
    def needs_only_pooled(self) -> bool:
        return self.first_order

    @property
    def pooled_name(self) -> str:
        """Short description of what `pooled_trunk` returns, for the key of its cache."""
        film = self._film()
        place = "after the trunk" if film.after_trunk else f"of the last {film.n_sites} blocks"
        maps = f"gradients by scale {film.has_scale}, shift {film.has_shift} {place}"
        return maps + (", head in float32" if self.head_in_float32 else "")

    def pooled_trunk(self, batch: PreferenceBatch) -> Tensor:
        """Compute the gradients of response log-probabilities by scale and shift, see `FiLM.gradients`."""
        return self._film().gradients(
            self.backbone, batch, lambda hidden: self.logps(hidden, batch)
        )

    def _film(self) -> FiLM:
        """Return the aggregator of a policy that learns to first order."""
        assert isinstance(self.aggregator, FiLM)
        return self.aggregator

    def margins_for(self, batch: PreferenceBatch, user: Tensor) -> tuple[Tensor, Tensor]:
        if batch.hidden is None:
            return super().margins_for(batch, user)
        assert batch.texts is not None
        with torch.autocast(user.device.type, enabled=False):
            ratios = self._film().first_order(batch.hidden, batch.texts, user)  # [C, B, 2]
        logits = ratios[..., 0] - ratios[..., 1]
        return self.beta * logits, logits

    def pair_loss(
        self, margins: Tensor, extra: Tensor, batch: PreferenceBatch, user: Tensor
    ) -> Tensor:
        feedback = batch.feedback
        if feedback is not None and feedback.choice is not None:
            is_other = self.dpo_loss != "sigmoid"
            has_ties, is_inner = self.log_tie is not None, self.inner is not None
            refuse_choices(
                [("model.ties", has_ties), ("model.loss", is_other), ("model.inner", is_inner)]
            )
        log_tie = None if self.log_tie is None else self.log_tie(user)
        how: dict[str, Any] = {"loss": self.dpo_loss, "label_smoothing": self.label_smoothing}
        return answer_losses(
            margins, feedback, log_tie, lambda: losses.dpo(extra, beta=self.beta, **how)
        )
