"""Computes a new user's vector as a weighted mean of clusters or train users: a discrete posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from plrhf.core.checks import PositiveFloat, check_arguments
from plrhf.core.choices import davidson
from plrhf.core.errors import bad_value
from plrhf.core.types import GENERIC_USER, PreferenceBatch
from plrhf.encoders import ClusterMixtureEncoder
from plrhf.models.adaptation.base import (
    Adaptation,
    AdaptedUsers,
    margin_gradients,
    with_precomputed,
)
from plrhf.models.adaptation.fitting import VectorSpace

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule

NUMBERS_AT_ONCE = 2**24
"""Largest number of hidden numbers in one forward pass over several particles: 64 MiB in float32."""
N_CHECKED = 3
TOLERANCE = 1e-4


@check_arguments("eval.adaptation")
class Reweight(Adaptation):
    """Weights known vectors e_j, the particles, by how well each explains the new user's pairs.

    e_u = sum_j w_j e_j with w_j ~ pi_j exp(sum_i log sigma(m_ij) / tau), where m_ij is the margin of
    pair i for particle j; a pair counts as often as its row says, and ties have their likelihood where
    the model has one (`choices.davidson`). This is Bayes' rule if the new user is one of the particles.
    HyRe (arXiv 2412.08812), DRM (arXiv 2502.13131), CoPL (arXiv 2503.01658) and MiCRo (arXiv
    2505.24846) are special cases, see docs/adaptation.md. A user without pairs gets the mean of the
    particles under pi.

    Args:
        of: the particles: ``clusters`` (of encoder=cluster) or train ``users``.
        temperature: tau; below 1, pairs count for more than their likelihood.
        per_pair: ``sum`` of the pairs' log-likelihoods, or ``mean``, as if each user had one pair.
        prior: pi: ``uniform``, or ``size``, each cluster's mean weight over the train users.
        map_only: use the most likely particle instead of the mean.
    """

    def __init__(
        self,
        *,
        of: Literal["clusters", "users"] = "users",
        temperature: PositiveFloat = 1.0,
        per_pair: Literal["sum", "mean"] = "sum",
        prior: Literal["uniform", "size"] = "uniform",
        map_only: bool = False,
    ) -> None:
        if prior == "size" and of == "users":
            raise bad_value(
                "eval.adaptation.prior",
                prior,
                "uniform with eval.adaptation.of=users, as each user is one",
                "Set eval.adaptation.prior=uniform",
            )
        self.of, self.temperature, self.per_pair = of, temperature, per_pair
        self.prior, self.map_only = prior, map_only

    @torch.no_grad()
    def fit(
        self,
        model: PersonalModule,
        batches: Sequence[PreferenceBatch],
        *,
        n_users: int,
        features: Tensor | None = None,
    ) -> AdaptedUsers:
        particles, log_prior = self.particles(model)
        fit = particles.new_zeros(n_users, len(particles), dtype=torch.float64)
        counts = fit.new_zeros(n_users, 1)
        for batch in with_precomputed(model, batches):
            of_pair = log_likelihoods(model, batch, particles).T.double()  # [B, J]
            fit.index_add_(0, batch.user_id, of_pair)
            counts.index_add_(0, batch.user_id, torch.ones_like(of_pair[:, :1]))
        if self.per_pair == "mean":
            fit /= counts.clamp(min=1)
        weights = (log_prior + fit / self.temperature).softmax(dim=1)  # [N, J]
        if self.map_only:
            return AdaptedUsers(vectors=particles[weights.argmax(dim=1)])
        return AdaptedUsers(vectors=weights.to(particles.dtype) @ particles)

    def particles(self, model: PersonalModule) -> tuple[Tensor, Tensor]:
        """Return the particles [J, user_dim], and log pi [J] float64 up to a constant."""
        if self.of == "users":
            vectors = VectorSpace(model).train
            return vectors, vectors.new_zeros(len(vectors), dtype=torch.float64)
        encoder = model.encoder
        if not isinstance(encoder, ClusterMixtureEncoder):
            raise bad_value(
                "eval.adaptation.of",
                self.of,
                f"users, as {type(encoder).__name__} has no clusters",
                "Set eval.adaptation.of=users, or train with encoder=cluster",
            )
        sizes = torch.ones(len(encoder.clusters), dtype=torch.float64, device=model.device)
        if self.prior == "size":
            n_users = encoder.weights.num_embeddings
            everyone = torch.arange(GENERIC_USER + 1, n_users, device=model.device)
            sizes = encoder.mixture(everyone).double().mean(dim=0)
        return encoder.clusters.detach(), sizes.log()


def log_likelihoods(model: PersonalModule, batch: PreferenceBatch, particles: Tensor) -> Tensor:
    """Compute the weighted log-likelihood of each pair for each of J user vectors, [J, B], in nats.

    Args:
        batch: as returned by `with_precomputed`. particles: [J, user_dim].
    """
    margins, feedback = margins_by_particle(model, batch, particles), batch.feedback
    found, log_tie = logsigmoid(margins), getattr(model, "log_tie", None)
    if log_tie is not None:
        none = torch.zeros_like(batch.user_id, dtype=torch.bool)
        is_tie = none if feedback is None else feedback.is_tie
        found = -davidson(margins, log_tie(particles)[:, None], is_tie)
    return found if feedback is None else found * feedback.weight


def margins_by_particle(model: PersonalModule, batch: PreferenceBatch, particles: Tensor) -> Tensor:
    """Compute the margin of each pair for each of J user vectors, [J, B].

    With FiLM and a linear head, for example, margins are linear in the user vector, and one matrix
    product gives all of them. Linearity is tested on a few particles; if it does not hold, the model's
    forward is used.

    Args:
        batch: as returned by `with_precomputed`. particles: [J, user_dim].
    """
    if not model.aggregator.after_trunk:
        return _margins_by_forward(model, batch, particles)
    centre = particles.mean(dim=0)
    at_centre, slopes = margin_gradients(
        model, batch, centre.expand(int(batch.user_id.max()) + 1, -1)
    )
    margins = at_centre + (particles - centre) @ slopes.T
    some = torch.linspace(0, len(particles) - 1, min(N_CHECKED, len(particles))).long()
    expected = _margins_by_forward(model, batch, particles[some])
    allowed = TOLERANCE * (1 + expected.abs().max())
    if bool((margins[some] - expected).abs().max() <= allowed):
        return margins
    return _margins_by_forward(model, batch, particles)


def _margins_by_forward(model: PersonalModule, batch: PreferenceBatch, particles: Tensor) -> Tensor:
    """Compute `margins_by_particle` by the model's forward, on a few particles at a time."""
    at_once = max(1, NUMBERS_AT_ONCE // (batch.input_ids.numel() * model.backbone.hidden_size))
    found = [
        model.margins_for(batch, some.repeat_interleave(len(batch), dim=0))[0]
        for some in particles.split(at_once)
    ]
    return torch.cat(found)
