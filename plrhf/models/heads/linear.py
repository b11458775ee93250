"""Heads of one direction for everybody: alone, stretched by user, or with a spread beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plrhf.core.checks import check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch
from plrhf.models.heads.base import RewardHead, broadcast_user


class LinearHead(RewardHead):
    """Computes the reward r = w . h, the same for all users; users act in the aggregator."""

    shift_cancels = True

    def __init__(self, *, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Linear(hidden_size, 1, bias=False).weight
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    @property
    def direction(self) -> Tensor | None:
        return self.weight[0]

    def read(self, pooled: Tensor) -> Tensor:
        return nn.functional.linear(pooled, self.weight)

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        return features.squeeze(-1).float()


@check_arguments("model.head")
class AffineHead(RewardHead):
    """Scales one reward by user, r = (1 + e_u) w . h; `aggregator.user_dim` is 1.

    Per-rater affine maps of a reward model (PEBS, arXiv 2606.27578), without the shift, which does not
    affect choices. The encoder's shrinkage or `optim.user_weight_decay` pulls users to the shared
    scale.
    """

    reads_user = True
    shift_cancels = True

    def __init__(self, *, hidden_size: int, user_dim: int) -> None:
        super().__init__()
        if user_dim != 1:
            raise bad_value(
                "aggregator.user_dim", user_dim, "1, the user's scale", "Set aggregator.user_dim=1"
            )
        self.shared = LinearHead(hidden_size=hidden_size)

    def read(self, pooled: Tensor) -> Tensor:
        return self.shared.read(pooled)

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        scale = 1 + broadcast_user(user, features).squeeze(-1).float()
        return scale * features.squeeze(-1).float()


class MeanVarianceHead(RewardHead):
    """Models the mean and variance of rewards over people, without knowing the user.

    p = Phi((mu_1 - mu_2) / sqrt(s_1^2 + s_2^2)) with the normal Phi (distributional preference learning
    of Siththaranjan et al. 2024, arXiv 2312.08358, the mean-and-variance model).
    """

    def __init__(self, *, hidden_size: int) -> None:
        super().__init__()
        self.mean = LinearHead(hidden_size=hidden_size)
        self.log_std = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.log_std.weight)
        nn.init.zeros_(self.log_std.bias)

    def read(self, pooled: Tensor) -> Tensor:
        return torch.cat([self.mean.read(pooled), self.log_std(pooled)], dim=-1)

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        return features[..., 0].float()

    def compare(
        self, features: Tensor, user: Tensor, batch: PreferenceBatch
    ) -> tuple[Tensor, Tensor]:
        difference, rewards = super().compare(features, user, batch)
        variance = (2 * features[..., 1].float()).exp().sum(-1)  # [C, B]
        z = difference / variance.sqrt()
        return torch.special.log_ndtr(z) - torch.special.log_ndtr(-z), rewards
