"""Fits a new user under several priors at once, weighted by how well each explains the user's pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plrhf.core.checks import NonNegativeFloat, PositiveFloat, PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch
from plrhf.models.adaptation.base import Adaptation, AdaptedUsers
from plrhf.models.adaptation.fitting import PairLosses, laplace_covariance, most_likely
from plrhf.models.adaptation.posterior import learned_prior

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule


@check_arguments("eval.adaptation")
class Mixture(Adaptation):
    """Allows for users unlike any in training: the generic user and wider priors compete by evidence.

    The prior of t (see `learned_prior`) is sum_k w_k N(0, s_k^2 I). Scale 1 is the prior learned from
    train users, scale 0 the generic user, and a scale above 1 a user further from the generic one than
    train users are. Under each prior the posterior is normal around its mode (Laplace), and its weight
    is w_k times the evidence p(pairs | k) (MacKay 1992, "Bayesian interpolation", eq. 2.7). The result
    is the normal distribution with the mean and covariance of their mixture.

    Args:
        scales: s_k, one of them 1. weights: w_k, before any pair. steps: largest number of L-BFGS
            iterations for each prior.
    """

    def __init__(
        self,
        *,
        scales: list[NonNegativeFloat] | None = None,
        weights: list[PositiveFloat] | None = None,
        steps: PositiveInt = 40,
    ) -> None:
        self.scales = [0.0, 1.0, 2.0] if scales is None else scales
        self.weights = [0.2, 0.7, 0.1] if weights is None else weights
        self.steps = steps
        if 1.0 not in self.scales or len(self.scales) != len(self.weights):
            raise bad_value(
                "eval.adaptation.scales",
                self.scales,
                f"{len(self.weights)} numbers, as there are weights, one of them 1",
                "Set eval.adaptation.scales=[0,1,2] eval.adaptation.weights=[0.2,0.7,0.1]",
            )

    def fit(
        self, model: PersonalModule, batches: Sequence[PreferenceBatch], *, n_users: int
    ) -> AdaptedUsers:
        losses = PairLosses(model, batches, learned_prior(model.encoder), n_users=n_users)
        found = [self._under(losses, scale) for scale in self.scales]
        modes = torch.stack([mode for mode, _, _ in found])  # [K, N, r]
        spread = torch.stack([covariance for _, covariance, _ in found])  # [K, N, r, r]
        prior = torch.tensor(self.weights, dtype=torch.float64).log().to(modes.device)
        evidence = torch.stack([one for _, _, one in found], dim=1)  # [N, K]
        shares = (prior + evidence).softmax(dim=1)
        mean, covariance = moments(shares.T.to(modes.dtype), modes, spread)
        users = losses.users_at(mean, covariance)
        return replace(users, shares=shares, resolved=self._resolved(shares, spread))

    def _resolved(self, shares: Tensor, spread: Tensor) -> Tensor:
        """Compute how much of the variance of t is gone, [N]: the mean over the priors that have some."""
        own = [n for n, scale in enumerate(self.scales) if scale > 0]
        squares = torch.tensor([self.scales[n] ** 2 for n in own], device=spread.device)
        left = spread[own].diagonal(dim1=2, dim2=3).mean(dim=2) / squares[:, None]  # [K, N]
        weights = shares[:, own].T / shares[:, own].sum(dim=1)
        return (weights * (1 - left)).sum(dim=0)

    def _under(self, losses: PairLosses, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return mode [N, r], covariance [N, r, r] and log evidence [N] under one prior."""
        start = losses.start()
        n = start.shape[1]
        if scale == 0:
            return start, start.new_zeros(len(start), n, n), -losses.by_user(start)
        penalty = scale**-2
        mode = most_likely(losses, steps=self.steps, penalty=penalty)
        covariance = laplace_covariance(losses, mode, penalty=penalty)
        density = losses.by_user(mode) + 0.5 * penalty * mode.double().square().sum(dim=1)
        volume = torch.linalg.slogdet(covariance.double() * penalty).logabsdet
        return mode, covariance, 0.5 * volume - density


def moments(shares: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean [N, r] and covariance [N, r, r] of N mixtures of K normal distributions.

    Args:
        shares: [K, N]. means: [K, N, r]. covariances: [K, N, r, r].
    """
    mean = (shares[..., None] * means).sum(dim=0)
    apart = means - mean
    spread = covariances + apart[..., None] * apart[..., None, :]
    return mean, (shares[..., None, None] * spread).sum(dim=0)
