"""The personalised reward model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plrhf.core import losses
from plrhf.core.checks import NonNegativeFloat, check_arguments
from plrhf.core.types import CHOSEN, PADDING, REJECTED, PreferenceBatch
from plrhf.models.base import PersonalModule
from plrhf.models.inference import Asked, score


def pool_responses(hidden: Tensor, segment: Tensor, *, n_pairs: int, pooling: str) -> Tensor:
    """Pool hidden states to one vector a response: its last token's, or the mean over its tokens.

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


@check_arguments("model")
class PersonalRewardModel(PersonalModule):
    """Rewards a response for a user, r(x, y, u), learned from choices (arXiv 2402.05133, P-RM).

    r = w . pool(h) over the response's hidden states h, on which the aggregator lets the user act.

    Args:
        pooling: ``last`` response token, or ``mean`` over the response's tokens.
        target_margin: m of `losses.bradley_terry`. centring: weight of `losses.reward_centring`.
        parts: see `PersonalModule`.
    """

    def __init__(
        self,
        *,
        pooling: Literal["last", "mean"] = "mean",
        target_margin: NonNegativeFloat = 0.0,
        centring: NonNegativeFloat = 0.0,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        if centring == 0:  # the loss then sees differences of rewards alone
            self.aggregator.drop_shift()
        self.pooling = pooling
        self.target_margin = target_margin
        self.centring = centring
        self.head = nn.Linear(self.aggregator.output_size, 1, bias=False)
        nn.init.normal_(self.head.weight, std=self.aggregator.output_size**-0.5)

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def score(self, asked: Asked, *, batch_size: int = 32) -> Tensor:
        """Reward responses for their users, [N]; see `inference.score`."""
        return score(self, asked, batch_size=batch_size)

    def values_without_user(self) -> dict[str, Callable[[PreferenceBatch], Tensor]]:
        return {"hidden": self.pooled_trunk} if self.aggregator.after_trunk else {}

    def without_user(self, batch: PreferenceBatch) -> PreferenceBatch:
        if not self.aggregator.after_trunk or batch.hidden is not None:
            return batch
        pooled = self.pooled_trunk(batch).flatten(0, 1)
        texts = torch.arange(len(pooled), device=pooled.device).view(len(batch), 2)
        return batch.pooled(pooled, texts)

    def hidden_for(self, batch: PreferenceBatch, user: Tensor) -> Tensor:
        # A trunk that does not depend on the user is run and pooled once for all contexts.
        return super().hidden_for(self.without_user(batch), user)

    def rewards(self, hidden: Tensor, batch: PreferenceBatch) -> Tensor:
        """Turn hidden states [C, R, L, d] into rewards [C, B, 2] float32 (chosen, rejected).

        With `aggregator.after_trunk` the hidden states are pooled already, [C, B, 2, d].
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
        """Whether training needs pooled trunk outputs alone, which then are computed once."""
        return self.aggregator.after_trunk and self.backbone.trainable == "frozen"

    def pooled_trunk(self, batch: PreferenceBatch) -> Tensor:
        """Run the trunk without any user and pool its outputs, [B, 2, d] float32."""
        hidden = self.backbone.read_text(batch)
        return pool_responses(
            hidden[None], batch.segment, n_pairs=len(batch), pooling=self.pooling
        )[0].float()
