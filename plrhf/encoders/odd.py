"""Users described by their choices: a user who makes the opposite choices has the opposite offset."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plrhf.core.checks import PositiveInt, check_arguments
from plrhf.core.types import UserContext
from plrhf.encoders.pair_reader import PairReader


@check_arguments("encoder")
class OddEncoder(PairReader):
    """Reads a user's pairs so that swapping chosen and rejected changes the sign of the user's offset.

    e_u = e_0 + o_u with o_u = z_u S. z_u has r numbers. It is the MAP estimate of a logistic regression
    on x_i = phi(c_i) - phi(r_i) for a user who chose c_i over r_i, with the prior N(0, 1). It therefore
    solves z = sum_i a_i x_i with a_i = s_i sigma(-z . x_i). s_i depends on x_i * x_i only, so a swap
    does not change a_i, and o_u is odd whatever has been learned. phi, s and S are trained through the
    steps of the regression.

    Args:
        hidden_size: width of `UserContext.hidden`.
        width: of the layer in phi(h) = A tanh(W LayerNorm(h)). rank: r.
        steps: of the regression, see `most_likely`.
        consensus: add to each margin z . x_i a term that all users share, from a learned score of each
            text. z_u then describes how the user differs from everybody; o_u is odd only if the score
            is swapped too.
        others: see `PairReader`.
    """

    def __init__(
        self,
        *,
        user_dim: int,
        hidden_size: int,
        width: PositiveInt = 128,
        rank: PositiveInt = 8,
        steps: PositiveInt = 4,
        consensus: bool = False,
        **reader: Any,
    ) -> None:
        super().__init__(user_dim=user_dim, **reader)
        self.steps = steps
        self.layer = nn.Sequential(
            nn.LayerNorm(hidden_size, elementwise_affine=False),
            nn.Linear(hidden_size, width),
            nn.Tanh(),
        )
        self.traits = nn.Linear(width, rank, bias=False)  # A
        self.agreed = nn.Linear(width, 1, bias=False) if consensus else None
        self.evidence = nn.Linear(rank, 1)  # s, before the sigmoid
        self.directions = nn.Parameter(torch.randn(rank, user_dim))  # S
        nn.init.zeros_(self.evidence.weight)
        nn.init.zeros_(self.evidence.bias)
        if self.agreed is not None:
            nn.init.zeros_(self.agreed.weight)

    def read(self, context: UserContext) -> tuple[Tensor, Tensor | None]:
        return self.generic_vector + self.offsets(context), None

    def offsets(self, context: UserContext) -> Tensor:
        """Compute o_u [B, user_dim]; zero for a user without pairs."""
        text = self.layer(context.hidden)  # [M, width]
        x = difference(self.traits(text), context.texts)  # [B, k, r]
        weight = 2 * self.evidence(x.square()).squeeze(-1).sigmoid() * context.present  # [B, k]
        known = None if self.agreed is None else difference(self.agreed(text), context.texts)
        shared = torch.zeros_like(weight) if known is None else known.squeeze(-1)
        return most_likely(x, weight, shared, steps=self.steps) @ self.directions


def difference(values: Tensor, texts: Tensor) -> Tensor:
    """Return the chosen text's value minus the rejected one's, [M, d] and [..., 2] -> [..., d].

    Args:
        texts: index of each pair's chosen and rejected text in `values`.
    """
    chosen, rejected = nn.functional.embedding(texts, values).unbind(dim=-2)
    return chosen - rejected


def most_likely(x: Tensor, weight: Tensor, shared: Tensor, *, steps: int) -> Tensor:
    """Find z [B, r] that maximises sum_i w_i log sigma(b_i + z . x_i) - |z|^2 / 2.

    Each step is a Newton step with the largest possible curvature, 1 + sum_i w_i x_i x_i^T / 4, so that
    none overshoots (Boehning and Lindsay 1988). The gradient flows through all steps.

    Args:
        x: [B, k, r]. weight, shared: w and b, [B, k]. steps: number of steps from z = 0.
    """
    z = x.new_zeros(x.shape[0], x.shape[2])
    prior = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    curvature = prior + 0.25 * (weight[..., None] * x).mT @ x  # [B, r, r]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature))
    for _ in range(steps):
        against = (-(shared + (x @ z[..., None]).squeeze(-1))).sigmoid()  # [B, k]
        gradient = ((weight * against)[..., None] * x).sum(dim=1) - z
        z = z + (inverse @ gradient[..., None]).squeeze(-1)
    return z
