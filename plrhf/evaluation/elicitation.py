"""Chooses which pair to ask a new user next, so that few answers say much about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from plrhf.core.types import PreferenceBatch
from plrhf.models.adaptation.base import AdaptedUsers, margin_gradients
from plrhf.models.base import PersonalModule
from plrhf.models.pair_batches import compute_per_pair

Rule = Literal["random", "uncertainty", "information", "variety"]
RULES: tuple[Rule, ...] = get_args(Rule)
N_NODES = 24
"""Number of nodes of the Gauss-Hermite quadrature."""


@dataclass(frozen=True)
class Candidates:
    """N pairs that a user may be asked, as the model sees them for this user.

    Attributes:
        margins: m_i at the user's most likely vector, [N] float64.
        slopes: derivative of m_i with respect to the fitted numbers t, [N, r] float64.
        variances: variance of m_i under the posterior of t, [N] float64.
    """

    margins: np.ndarray
    slopes: np.ndarray
    variances: np.ndarray


def candidates_of(
    model: PersonalModule, batches: Sequence[PreferenceBatch], users: AdaptedUsers
) -> Candidates:
    """Compute margins of pairs, each for its user (`user_id` of a batch), and how sure they are.

    Args:
        users: with a covariance, as `Posterior(laplace=True)` gives.
    """
    covariance, directions = users.covariance, users.directions
    assert covariance is not None and directions is not None

    def of_batch(batch: PreferenceBatch) -> Tensor:
        margins, slopes = margin_gradients(model, batch, users.vectors)
        of_t = torch.einsum("bru,bu->br", directions[batch.user_id], slopes)
        variance = torch.einsum("br,brs,bs->b", of_t, covariance[batch.user_id], of_t)
        return torch.cat([margins[:, None], variance.clamp(min=0)[:, None], of_t], dim=1)

    found = compute_per_pair(of_batch, batches, users.vectors.device).double().numpy()
    return Candidates(margins=found[:, 0], slopes=found[:, 2:], variances=found[:, 1])


def information_gain(margins: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """Compute how much an answer is expected to tell about the user, in nats, [N].

    This is the mutual information of the answer and the user, H(E p) - E H(p), with p = sigma(m) and m
    ~ N(margin, variance) (Houlsby et al. 2011, arXiv 1112.5745, eq. 2). For small variances it is
    p (1 - p) variance / 2, the D-optimal design of a logistic model.
    """
    nodes, weights = hermegauss(N_NODES)
    drawn = margins[:, None] + np.sqrt(variances)[:, None] * nodes  # [N, nodes]
    p = 1 / (1 + np.exp(-drawn))
    weights = weights / weights.sum()
    gain = _entropy(p @ weights) - _entropy(p) @ weights
    return np.asarray(gain.clip(min=0))


def _entropy(p: np.ndarray) -> np.ndarray:
    """Compute the entropy of a yes-no answer in nats."""
    q = np.clip(p, 1e-12, 1 - 1e-12)
    return np.asarray(-q * np.log(q) - (1 - q) * np.log(1 - q))


def most_different(slopes: np.ndarray, asked: np.ndarray) -> int:
    """Return the candidate least like the pairs asked before, by the cosine of their slopes.

    The sign of a slope depends on which response is called chosen, so it does not count. If nothing was
    asked, it is the candidate with the longest slope.

    Args:
        slopes: of the candidates, [N, r]. asked: of the pairs asked, [n, r].
    """
    lengths = np.linalg.norm(slopes, axis=1)
    if len(asked) == 0:
        return int(lengths.argmax())
    of_asked = asked / np.maximum(np.linalg.norm(asked, axis=1, keepdims=True), 1e-12)
    cosines = np.abs(slopes @ of_asked.T) / np.maximum(lengths, 1e-12)[:, None]
    # Of equally different ones, the one that changes most with the user.
    return int(np.lexsort((-lengths, cosines.max(axis=1).round(6)))[0])


def choose(
    rule: Rule,
    candidates: Candidates,
    generator: np.random.Generator,
    *,
    asked: np.ndarray | None = None,
) -> int:
    """Return the index of the pair to ask next.

    Args:
        rule: ``random``; ``uncertainty``, the pair whose answer is hardest to predict; ``information``,
            see `information_gain`; or ``variety``, see `most_different`.
        generator: for ``random``. asked: slopes of the pairs asked before, for ``variety``; None: none.
    """
    if rule == "random":
        return int(generator.integers(len(candidates.margins)))
    if rule == "information":
        return int(information_gain(candidates.margins, candidates.variances).argmax())
    if rule == "variety":
        before = candidates.slopes[:0] if asked is None else asked
        return most_different(candidates.slopes, before)
    attenuated = candidates.margins / np.sqrt(1 + np.pi / 8 * candidates.variances)
    return int(np.abs(attenuated).argmin())
