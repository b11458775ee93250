"""Fits a new user under two priors at once, weighted by how well each explains the user's pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plrhf.core.checks import FractionBelowOne, PositiveFloat, PositiveInt, check_arguments
from plrhf.core.types import PreferenceBatch
from plrhf.models.adaptation.base import Adaptation, AdaptedUsers
from plrhf.models.adaptation.fitting import (
    Coordinates,
    PairLosses,
    laplace_covariance,
    most_likely,
)
from plrhf.models.adaptation.posterior import train_directions

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule


CAUTIOUS_PAIRS = 4
"""Number of pairs after which caution is halved."""


@check_arguments("eval.adaptation")
class Mixture(Adaptation):
    """Allows for strangers, users unlike any in training: two priors compete by evidence.

    Let M be the second moment of the train users' rows around the generic one, and l its largest
    eigenvalue. A user is like train users with prior N(0, scale^2 M), or a stranger with prior
    N(0, stranger_scale^2 (l I - M)): they differ from the generic user in the directions in which train
    users differ least. Under each prior the posterior is normal around its mode (Laplace), and its weight
    is its probability before any pair times the evidence p(pairs | prior) (MacKay 1992, "Bayesian
    interpolation", eq. 2.7). The result is the normal distribution with the mean and covariance of their
    mixture. If train users differ equally in all directions, strangers are the generic user.

    A few pairs cannot tell who is a stranger, whom a wrong prior harms. Therefore the generic user also has
    a share, which does not depend on what the pairs say: caution / (1 + (n / 4)^2) after n pairs.

    Args:
        scale: of the first prior; above 1, since the rows of train users were shrunk in training.
        strangers: probability of a stranger before any pair. stranger_scale: of the second prior; large,
            since rows count for less in directions that training has not used.
        caution: share of the generic user before any pair.
        steps: largest number of iterations for each prior.
    """

    def __init__(
        self,
        *,
        scale: PositiveFloat = 1.25,
        strangers: FractionBelowOne = 0.2,
        stranger_scale: PositiveFloat = 6.0,
        caution: FractionBelowOne = 0.3,
        steps: PositiveInt = 40,
    ) -> None:
        self.scale, self.strangers = scale, strangers
        self.stranger_scale, self.caution, self.steps = stranger_scale, caution, steps

    def fit(
        self,
        model: PersonalModule,
        batches: Sequence[PreferenceBatch],
        *,
        n_users: int,
        features: Tensor | None = None,
    ) -> AdaptedUsers:
        space, sizes, directions = train_directions(model.encoder)
        largest = sizes.max().clamp(min=torch.finfo(sizes.dtype).tiny)
        share = sizes / largest
        scales = torch.stack(  # [2, r], standard deviations of t under each prior
            [self.scale * share, self.stranger_scale * (1 - share.square()).clamp(min=0).sqrt()]
        )
        isotropic = Coordinates(space, space.generic, largest * directions)
        losses = PairLosses(model, batches, isotropic, n_users=n_users, features=features)
        found = [self._under(losses, scale) for scale in scales]
        modes = torch.stack([mode for mode, _, _ in found])  # [2, N, r]
        spread = torch.stack([covariance for _, covariance, _ in found])  # [2, N, r, r]
        prior = torch.tensor([1 - self.strangers, self.strangers], dtype=torch.float64)
        evidence = torch.stack([one for _, _, one in found], dim=1)  # [N, 2]
        shares = (prior.log().to(evidence.device) + evidence).softmax(dim=1)
        mean, covariance = moments(shares.T.to(modes.dtype), modes, spread)
        generic = self.caution / (1 + (losses.counts / CAUTIOUS_PAIRS).square())  # [N]
        with_generic = [torch.stack([one, torch.zeros_like(one)]) for one in (mean, covariance)]
        mean, covariance = moments(torch.stack([1 - generic, generic]), *with_generic)
        # Of a prior without variance nothing can be found out.
        total = scales.square().sum(dim=1)  # [2]
        gone = 1 - spread.diagonal(dim1=2, dim2=3).sum(dim=2) / total[:, None].clamp(min=1e-30)
        weights = shares.T * (total > 0)[:, None]
        resolved = (weights * gone).sum(dim=0) / weights.sum(dim=0).clamp(min=1e-30)
        return replace(losses.users_at(mean, covariance), shares=shares, resolved=resolved)

    def _under(self, losses: PairLosses, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mode [N, r], covariance [N, r, r] and log evidence [N] under the prior N(0, scale^2)."""
        whitened = losses.scaled(scale)
        mode = most_likely(whitened, steps=self.steps)
        covariance = laplace_covariance(whitened, mode)
        density = whitened.by_user(mode) + 0.5 * mode.double().square().sum(dim=1)
        volume = torch.linalg.slogdet(covariance.double()).logabsdet
        return scale * mode, scale[:, None] * covariance * scale, 0.5 * volume - density


def moments(shares: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean [N, r] and covariance [N, r, r] of N mixtures of K normal distributions.

    Args:
        shares: [K, N]. means: [K, N, r]. covariances: [K, N, r, r].
    """
    mean = (shares[..., None] * means).sum(dim=0)
    apart = means - mean
    spread = covariances + apart[..., None] * apart[..., None, :]
    return mean, (shares[..., None, None] * spread).sum(dim=0)
