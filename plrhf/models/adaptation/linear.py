"""Fits users whose margins are linear in their numbers t: a small logistic regression for each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

HALVINGS = 8
TOLERANCE = 1e-7
"""Newton's method ends when no number of any user moves further than this."""


@dataclass(frozen=True)
class LinearMargins:
    """Pairs of N users with the loss -log sigma(m), and margins m = c + s . t linear in the user's t.

    K is the largest number of pairs of a user. All numbers are float64.

    Attributes:
        constants: c, [N, K]. slopes: s, [N, K, r]. is_pair: 1 where a user has so many pairs, else 0.
    """

    constants: Tensor
    slopes: Tensor
    is_pair: Tensor

    @classmethod
    def of_pairs(
        cls, users: Tensor, constants: Tensor, slopes: Tensor, *, n_users: int
    ) -> LinearMargins:
        """Arrange pairs by user.

        Args:
            users: of each pair, [M]. constants: [M]. slopes: [M, r].
        """
        counts = users.bincount(minlength=n_users)
        order = users.argsort(stable=True)
        starts = (counts.cumsum(0) - counts)[users[order]]
        place = torch.arange(len(users), device=users.device) - starts
        shape = (n_users, int(counts.max()) if len(users) > 0 else 0)
        at = users[order], place

        def arranged(values: Tensor) -> Tensor:
            found = values.new_zeros(*shape, *values.shape[1:], dtype=torch.float64)
            found[at] = values[order].double()
            return found

        return cls(arranged(constants), arranged(slopes), arranged(torch.ones_like(constants)))

    def scaled(self, scale: Tensor) -> LinearMargins:
        """Return the same margins as a function of t / scale, with scale [r]."""
        return replace(self, slopes=self.slopes * scale)

    def margins(self, t: Tensor) -> Tensor:
        """Compute the margins [N, K] for t [N, r]."""
        return self.constants + (self.slopes @ t.double()[..., None])[..., 0]

    def by_user(self, t: Tensor) -> Tensor:
        """Compute the sum of the losses of each user's pairs, [N]."""
        return -(self.is_pair * logsigmoid(self.margins(t))).sum(dim=1)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute gradient [N, r] and Hessian [N, r, r] of each user's summed loss."""
        p = torch.sigmoid(self.margins(t))
        gradient = -((self.is_pair * (1 - p))[:, None] @ self.slopes)[:, 0]
        weight = self.is_pair * p * (1 - p)
        return gradient, (weight[..., None] * self.slopes).mT @ self.slopes


@torch.no_grad()
def newton(pairs: LinearMargins, *, steps: int, penalty: float) -> Tensor:
    """Minimise the summed loss + penalty |t|^2 / 2 of each user from t = 0; return t [N, r] float64.

    Steps are halved until the user's objective does not rise.

    Args:
        steps: largest number of steps.
    """

    def objective(t: Tensor) -> Tensor:
        return pairs.by_user(t) + 0.5 * penalty * t.square().sum(dim=1)

    t = pairs.slopes.new_zeros(len(pairs.slopes), pairs.slopes.shape[2])
    eye, value = torch.eye(t.shape[1], dtype=t.dtype, device=t.device), objective(t)
    for _ in range(steps):
        gradient, hessian = pairs.derivatives(t)
        move = least_solution(hessian + penalty * eye, gradient + penalty * t)
        for _ in range(HALVINGS):
            new = objective(t - move)
            rises = new > value
            if not bool(rises.any()):
                break
            move = torch.where(rises[:, None], 0.5 * move, move)
        move = torch.where((new > value)[:, None], 0, move)
        t, value = t - move, torch.minimum(new, value)
        if bool(move.abs().max() < TOLERANCE):
            break
    return t


def least_solution(matrices: Tensor, values: Tensor) -> Tensor:
    """Solve A x = b for symmetric A [N, r, r] and b [N, r]; where A is singular x is the shortest.

    Without a penalty it is, as soon as a user has fewer pairs than numbers.
    """
    found, failed = torch.linalg.solve_ex(matrices, values)
    if bool(failed.any()):
        at = failed != 0
        inverse = torch.linalg.pinv(matrices[at], hermitian=True)
        found[at] = (inverse @ values[at][..., None])[..., 0]
    return found
