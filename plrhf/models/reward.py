"""The personalised reward model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from plrhf.core import losses
from plrhf.core.errors import bad_value
from plrhf.core.types import CHOSEN, PADDING, REJECTED, PreferenceBatch
from plrhf.models.base import PersonalModule

POOLINGS = ("last", "mean")


def pool_responses(hidden: Tensor, segment: Tensor, *, n_pairs: int, pooling: str) -> Tensor:
    """One vector a response: its last token's, or the mean over its tokens.

    Args:
        hidden: [C, R, L, d]. segment: [R, L] int64. n_pairs: B. pooling: "last" or "mean".

    Returns:
        [C, B, 2, d]: chosen, rejected.
    """
    weights = []
    for mark in (CHOSEN, REJECTED):
        member = segment == mark
        if pooling == "last":
            following = nn.functional.pad(segment, (0, 1), value=PADDING)[:, 1:]
            member = member & (following != mark)
        weights.append(member / member.sum(dim=1, keepdim=True).clamp(min=1))
    weight = torch.stack(weights, dim=1).to(hidden.dtype)  # [R, 2, L]
    of_row = weight @ hidden  # [C, R, 2, d]
    return of_row.unflatten(1, (-1, n_pairs)).sum(dim=1)


class PersonalRewardModel(PersonalModule):
    """r(x, y, u): reward of a response for a user, learned from choices (arXiv 2402.05133, P-RM).

    r = w . pool(h) over the response's hidden states h, user vectors met where the aggregator says.

    Args:
        pooling: ``last`` response token, or ``mean`` over the response's tokens.
        target_margin: m of `losses.bradley_terry`. centring: weight of `losses.reward_centring`, >= 0.
        parts: see `PersonalModule`.
    """

    def __init__(
        self,
        *,
        pooling: Literal["last", "mean"] = "mean",
        target_margin: float = 0.0,
        centring: float = 0.0,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        if pooling not in POOLINGS:
            raise bad_value(
                "model.pooling", pooling, " or ".join(POOLINGS), "Set model.pooling=mean"
            )
        for name, value in (("target_margin", target_margin), ("centring", centring)):
            if value < 0:
                raise bad_value(f"model.{name}", value, "a number from 0", f"Set model.{name}=0")
        self.pooling = pooling
        self.target_margin = target_margin
        self.centring = centring
        self.head = nn.Linear(self.aggregator.output_size, 1, bias=False)
        nn.init.normal_(self.head.weight, std=self.aggregator.output_size**-0.5)

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def hidden_for(self, batch: PreferenceBatch, user: Tensor) -> Tensor:
        # Free of the user, trunk outputs are pooled before the user comes in: once for all contexts.
        if self.aggregator.after_trunk and batch.hidden is None:
            pooled = self.pooled_trunk(batch).flatten(0, 1)
            texts = torch.arange(len(pooled), device=pooled.device).view(len(batch), 2)
            batch = batch.pooled(pooled, texts)
        return super().hidden_for(batch, user)

    def rewards(self, hidden: Tensor, batch: PreferenceBatch) -> Tensor:
        """Hidden states [C, R, L, d] -> rewards [C, B, 2] float32 (chosen, rejected).

        Where pooled ones come in, [C, B, 2, d], they are what pooling would give.
        """
        pooled = hidden
        if not self.aggregator.after_trunk:
            pooled = pool_responses(hidden, batch.segment, n_pairs=len(batch), pooling=self.pooling)
        with torch.autocast(pooled.device.type, enabled=False):  # which would round rewards
            return self.head(pooled.to(self.head.weight.dtype)).squeeze(-1).float()

    def margins(self, hidden: Tensor, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        rewards = self.rewards(hidden, batch)
        return rewards[..., 0] - rewards[..., 1], rewards

    def pair_loss(self, margins: Tensor, extra: Tensor) -> Tensor:
        loss = losses.bradley_terry(margins, target_margin=self.target_margin)
        return loss + self.centring * losses.reward_centring(extra[..., 0], extra[..., 1])

    @property
    def pooled_suffices(self) -> bool:
        """Whether pooled trunk outputs, computed once, are all that training will need."""
        return self.aggregator.after_trunk and self.backbone.trainable == "frozen"

    def pooled_trunk(self, batch: PreferenceBatch) -> Tensor:
        """Pooled last hidden states without any user, [B, 2, d] float32."""
        inputs = self.backbone.embed(batch.input_ids)
        hidden = self.backbone(inputs, batch.segment, batch.position_ids)
        return pool_responses(
            hidden[None], batch.segment, n_pairs=len(batch), pooling=self.pooling
        )[0].float()
