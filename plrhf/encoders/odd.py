"""Users by what they chose: who always chooses the other response has the opposite vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plrhf.core.checks import PositiveInt, check_arguments
from plrhf.core.types import UserContext
from plrhf.encoders.pair_reader import PairReader


@check_arguments("encoder")
class OddEncoder(PairReader):
    """Reads pairs so that swapping chosen and rejected turns a user's offset round.

    e_u = e_0 + o_u, o_u = z_u S. z_u are the r most likely numbers of a person who chose c_i over r_i
    by logistic regression on x_i = phi(c_i) - phi(r_i), with the prior N(0, 1): they solve
    z = sum_i a_i (phi(c_i) - phi(r_i)) with a_i = s_i sigma(-z . x_i). The weights a_i are even under the
    swap, as s_i depends on x_i * x_i alone, so that o_u is odd, whatever has been learned. The steps of
    the regression are part of the network, and phi, s and S are learned through them.

    Args:
        hidden_size: width of `UserContext.hidden`.
        width: of the layer in phi(h) = A tanh(W LayerNorm(h)). rank: r.
        steps: of the regression, see `most_likely`.
        consensus: let x_i be weighed by how much the choice goes against everybody's, which a learned
            scalar of each text says: z_u is then that of a person beside the generic one, and only odd
            where that scalar is swapped too.
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
        """Compute o_u [B, user_dim]; zero where a user has no pair."""
        text = self.layer(context.hidden)  # [M, width]
        x = difference(self.traits(text), context.texts)  # [B, k, r]
        weight = 2 * self.evidence(x.square()).squeeze(-1).sigmoid() * context.present  # [B, k]
        known = None if self.agreed is None else difference(self.agreed(text), context.texts)
        shared = torch.zeros_like(weight) if known is None else known.squeeze(-1)
        return most_likely(x, weight, shared, steps=self.steps) @ self.directions


def difference(values: Tensor, texts: Tensor) -> Tensor:
    """Return the value of the chosen less that of the rejected text, [M, d] and [..., 2] -> [..., d]."""
    chosen, rejected = nn.functional.embedding(texts, values).unbind(dim=-2)
    return chosen - rejected


def most_likely(x: Tensor, weight: Tensor, shared: Tensor, *, steps: int) -> Tensor:
    """Find z [B, r] that maximise sum_i w_i log sigma(b_i + z . x_i) - |z|^2 / 2.

    Every step is Newton's with the largest curvature there can be, 1 + sum_i w_i x_i x_i^T / 4, so that
    none goes too far (Boehning and Lindsay 1988). The gradient flows through all of them.

    Args:
        x: [B, k, r]. weight, shared: w and b, [B, k]. steps: from z = 0.
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
