"""Fits a new user by penalised logistic regression in the span of the train users' vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plrhf.core.checks import NonNegativeFloat, PositiveInt, check_arguments
from plrhf.core.types import PreferenceBatch
from plrhf.models.adaptation.base import Adaptation, AdaptedUsers
from plrhf.models.adaptation.fitting import Coordinates, PairLosses, VectorSpace, most_likely

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule

SMALLEST = 1e-5
"""Directions with a singular value below this fraction of the largest are left out."""


@check_arguments("eval.adaptation")
class Basis(Adaptation):
    """Fits e_u itself, restricted to the span of the train users' differences from the generic user.

    Minimises sum_pairs loss(pair, e_0 + c U) + l2 |c|^2 / 2 over c, where U is an orthonormal basis of
    the span. This is convex if margins are linear in e_u (FiLM at the last layer). It is the convex fit
    of RFM (Barreto et al. 2025, arXiv 2503.17338) and PReF (arXiv 2503.06358, section 3). `Posterior`
    knows how much train users vary in each direction; this rule treats all directions alike.

    Args:
        steps: largest number of L-BFGS iterations. l2: weight of the penalty, 0 for none.
    """

    def __init__(self, *, steps: PositiveInt = 100, l2: NonNegativeFloat = 1.0) -> None:
        self.steps, self.l2 = steps, l2

    def fit(
        self,
        model: PersonalModule,
        batches: Sequence[PreferenceBatch],
        *,
        n_users: int,
        features: Tensor | None = None,
    ) -> AdaptedUsers:
        space = VectorSpace(model)
        _, sizes, directions = torch.linalg.svd(space.train - space.generic, full_matrices=False)
        factor = directions[sizes > SMALLEST * sizes.max()]
        losses = PairLosses(
            model, batches, Coordinates(space, space.generic, factor), n_users=n_users
        )
        return losses.users_at(most_likely(losses, steps=self.steps, penalty=self.l2))
