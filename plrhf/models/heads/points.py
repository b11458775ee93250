"""Heads by how near a response is to the point of the user: distance and cosine."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from plrhf.core.checks import PositiveFloat, PositiveInt, check_arguments
from plrhf.core.types import PreferenceBatch
from plrhf.models.heads.base import RewardHead, broadcast_user, distinct_rows, projector


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


SMALLEST_SQUARE = 1e-12
"""Of a user's point, which is never divided by less than its root."""


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
        # Of a text and its prompt K cosines' numerators and the products of the points are all that counts.
        response, prompt = pooled.chunk(2, dim=-1)
        direction = nn.functional.normalize(self.project(response), dim=-1)
        prompts, place = distinct_rows(prompt)
        points = torch.stack([one(prompts) for one in self.points], dim=-2)  # [..., K, dim]
        products = (points @ points.mT).flatten(-2)
        if place is not None:
            points, products = points[place], products[place]
        along = (points @ direction.unsqueeze(-1)).squeeze(-1)  # [..., K]
        return torch.cat([along, products], dim=-1)

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        point = broadcast_user(user, features)
        if not self.reads_prompt:
            cosine = nn.functional.cosine_similarity(features, point, dim=-1)
        else:
            n_points = len(self.points)
            along, products = features.split([n_points, n_points**2], dim=-1)
            share = point.softmax(-1)  # [C, B, 1, K]
            pairs = (share.unsqueeze(-1) * share.unsqueeze(-2)).flatten(-2)
            square = (products * pairs).sum(-1)  # |u(x)|^2
            cosine = (along * share).sum(-1) / square.clamp(min=SMALLEST_SQUARE).sqrt()
        return (self.log_scale.exp().clamp(max=self.largest_scale) * cosine).float()
