"""Fits a new user by maximum a posteriori, under a prior learned from the train users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plrhf.core.checks import PositiveFloat, PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch
from plrhf.encoders import UserEncoder
from plrhf.models.adaptation.base import Adaptation, AdaptedUsers
from plrhf.models.adaptation.fitting import (
    Coordinates,
    PairLosses,
    RowSpace,
    laplace_covariance,
    most_likely,
)

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule


def train_directions(encoder: UserEncoder) -> tuple[RowSpace, Tensor, Tensor]:
    """Find the directions in which train users differ from the generic one.

    These are the eigenvectors of M = 1/n sum_u (z_u - z_0)(z_u - z_0)^T, where z_u are the rows of train
    user u in the encoder's tables and z_0 the generic user's.

    Returns:
        The space of the rows; the square roots of the eigenvalues, largest first, [r]; and the
        directions, [r, D], orthonormal, r = min(D, n).

    Raises:
        ValueError: the encoder has no tables with a row for each user, or no train user is in them.
    """
    space = RowSpace(encoder)
    departures = space.train - space.generic
    if len(departures) == 0:
        allowed = "a rule without a prior from train users, of whom this export has none"
        raise bad_value("adaptation", "posterior", allowed, "Set eval/adaptation=gradient")
    _, sizes, directions = torch.linalg.svd(departures, full_matrices=False)
    return space, len(departures) ** -0.5 * sizes, directions


def learned_prior(encoder: UserEncoder, *, scale: float = 1.0) -> Coordinates:
    """Return the prior of a new user's rows z of the encoder's tables, N(z_0, scale^2 M).

    See `train_directions` for z_0 and M. The prior is given as coordinates z = z_0 + t F with
    F^T F = scale^2 M and t ~ N(0, 1). A new user is thus a combination of the train users' differences
    from the generic user.
    """
    space, sizes, directions = train_directions(encoder)
    return Coordinates(space, space.generic, scale * sizes[:, None] * directions)


@check_arguments("eval.adaptation")
class Posterior(Adaptation):
    """Finds the most likely user under a prior learned from the train users (empirical Bayes).

    Minimises sum_pairs loss(pair, z_0 + t F) + |t|^2 / 2 over t, see `learned_prior`. A user without
    pairs is the generic user, or what the encoder makes of the user's features.

    Args:
        steps: largest number of L-BFGS iterations; it stops earlier on convergence.
        prior_scale: factor on the prior's standard deviation; a small one keeps new users near the
            generic user.
        laplace: also compute the covariance of t, see `laplace_covariance`.
    """

    def __init__(
        self,
        *,
        steps: PositiveInt = 40,
        prior_scale: PositiveFloat = 1.0,
        laplace: bool = False,
    ) -> None:
        self.steps, self.prior_scale, self.laplace = steps, prior_scale, laplace

    def fit(
        self,
        model: PersonalModule,
        batches: Sequence[PreferenceBatch],
        *,
        n_users: int,
        features: Tensor | None = None,
    ) -> AdaptedUsers:
        prior = learned_prior(model.encoder, scale=self.prior_scale)
        losses = PairLosses(model, batches, prior, n_users=n_users, features=features)
        t = most_likely(losses, steps=self.steps)
        return losses.users_at(t, laplace_covariance(losses, t) if self.laplace else None)
