"""Heads by how near a response is to the point of the user: distance and cosine."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from plrhf.core.checks import PositiveFloat, PositiveInt, check_arguments
from plrhf.core.types import PreferenceBatch
from plrhf.models.heads.base import RewardHead, broadcast_user, projector


@check_arguments("model.head")
class DistanceHead(RewardHead):
    """Computes the reward as the distance from the user's ideal point, r = -|f(h) - e_u|.

    PAL-A of Chen et al. 2024, arXiv 2406.08469, section 3, where e_u is a mixture of K prototypes
    (``encoder=cluster``) and the loss is the hinge (``model.loss=hinge``).

    Args:
        width: of the layers in f; None: f is linear. layers: their number; the authors have two.
    """

    reads_user = True

    def __init__(
        self,
        *,
        hidden_size: int,
        user_dim: int,
        width: PositiveInt | None = None,
        layers: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.project = projector(hidden_size, user_dim, width, layers)

    def read(self, pooled: Tensor) -> Tensor:
        found: Tensor = self.project(pooled)
        return found

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        away = features - broadcast_user(user, features)
        # The norm has no gradient at 0.
        return -(away.float().square().sum(-1) + 1e-12).sqrt()


@check_arguments("model.head")
class CosineHead(RewardHead):
    """Computes the reward as a scaled cosine, r = exp(s) cos(f(h), u), with a learned s.

    u is the user's vector. With `prompt_width` it also depends on the prompt x: u(x) = sum_k
    softmax(e_u)_k g_k(h_x), with one g_k for each number of e_u. This is PAL-B of Chen et al. 2024,
    arXiv 2406.08469.

    Args:
        width: of the layers in f; None: f is linear.
        prompt_width: of the layers in the g_k; None: u is the user's vector.
        layers: number of layers in f and in each g_k.
        dim: width of f(h) and u(x); without `prompt_width` it is the user vector's.
        temperature: initial exp(-s).
    """

    reads_user = True
    largest_scale = 100.0

    def __init__(
        self,
        *,
        hidden_size: int,
        user_dim: int,
        width: PositiveInt | None = None,
        prompt_width: PositiveInt | None = None,
        layers: PositiveInt = 1,
        dim: PositiveInt = 64,
        temperature: PositiveFloat = 0.07,
    ) -> None:
        super().__init__()
        self.reads_prompt = prompt_width is not None
        dim = dim if self.reads_prompt else user_dim
        self.project = projector(hidden_size, dim, width, layers)
        n_points = user_dim if self.reads_prompt else 0
        self.points = nn.ModuleList(
            projector(hidden_size, dim, prompt_width, layers) for _ in range(n_points)
        )
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def read(self, pooled: Tensor) -> Tensor:
        if not self.reads_prompt:
            return self.project(pooled)
        response, prompt = pooled.chunk(2, dim=-1)
        return torch.cat([self.project(response), *(one(prompt) for one in self.points)], dim=-1)

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        point = broadcast_user(user, features)
        if self.reads_prompt:
            parts = features.unflatten(-1, (1 + len(self.points), -1))  # [C, B, 2, 1 + K, dim]
            features, points = parts[..., 0, :], parts[..., 1:, :]
            point = (points * point.softmax(-1).unsqueeze(-1)).sum(-2)
        cosine = nn.functional.cosine_similarity(features, point, dim=-1)
        return (self.log_scale.exp().clamp(max=self.largest_scale) * cosine).float()
