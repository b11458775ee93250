"""A head that is an MLP on the response and the user."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from plrhf.core.checks import PositiveInt, check_arguments
from plrhf.core.types import PreferenceBatch
from plrhf.models.heads.base import RewardHead, broadcast_user


@check_arguments("model.head")
class DecoderHead(RewardHead):
    """Computes the reward by an MLP on [h; e_u] (VPL: Poddar et al. 2024, arXiv 2408.10075).

    With `film` the user also scales and shifts the last layer, x' = (1 + tanh(a_u) / 2) x + tanh(b_u) /
    2 with linear a_u, b_u (SPL's decoder, arXiv 2603.12595).

    Args:
        width: H of the layers.
    """

    reads_user = True

    def __init__(
        self, *, hidden_size: int, user_dim: int, width: PositiveInt = 512, film: bool = False
    ) -> None:
        super().__init__()
        first = max(1, width // 2) if film else width
        self.hidden_size = hidden_size
        self.body = nn.Sequential(
            nn.Linear(hidden_size + user_dim, first),
            nn.LeakyReLU(0.2),
            nn.Linear(first, width),
            nn.LeakyReLU(0.2),
        )
        self.film = nn.Linear(user_dim, 2 * width) if film else None
        self.out = nn.Linear(width, 1)

    def read(self, pooled: Tensor) -> Tensor:
        first: Any = self.body[0]  # the response's share of the first layer
        return nn.functional.linear(pooled, first.weight[:, : self.hidden_size], first.bias)

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        of_user, first = broadcast_user(user, features), self.body[0]
        share = nn.functional.linear(of_user, first.weight[:, self.hidden_size :])  # type: ignore[index]
        features = self.body[1:](features + share)
        if self.film is not None:
            scale, shift = (0.5 * self.film(of_user).tanh()).chunk(2, dim=-1)
            features = (1 + scale) * features + shift
        return self.out(features).squeeze(-1).float()
