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

Rule = Literal["random", "uncertainty", "information", "prediction", "variety"]
RULES: tuple[Rule, ...] = get_args(Rule)
N_NODES = 24
"""Number of nodes of the Gauss-Hermite quadrature."""


@dataclass(frozen=True)
class Candidates:
    """N pairs that a user may be asked, as the model sees them for this user.

    Attributes:
        margins: m_i at the user's most likely vector, [N] float64.
        slopes: derivative x_i of m_i with respect to the fitted numbers t, [N, r] float64.
        spreads: S x_i with the posterior covariance S of t, [N, r] float64.
    """

    margins: np.ndarray
    slopes: np.ndarray
    spreads: np.ndarray

    @property
    def variances(self) -> np.ndarray:
        """Variance of m_i under the posterior of t, [N]."""
        return np.asarray((self.slopes * self.spreads).sum(axis=1).clip(min=0))

    @property
    def attenuated(self) -> np.ndarray:
        """Margins whose sigmoid is the mean probability under the posterior, [N] (MacKay 1992, eq. 10)."""
        return np.asarray(self.margins / np.sqrt(1 + np.pi / 8 * self.variances))

    def at(self, places: np.ndarray) -> Candidates:
        """Return the candidates at these places."""
        return Candidates(self.margins[places], self.slopes[places], self.spreads[places])


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
        spread = torch.einsum("brs,bs->br", covariance[batch.user_id], of_t)
        return torch.cat([margins[:, None], of_t, spread], dim=1)

    found = compute_per_pair(of_batch, batches, users.vectors.device).double().numpy()
    slopes, spreads = np.split(found[:, 1:], 2, axis=1)
    return Candidates(found[:, 0], slopes, spreads)


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


def brier_reduction(candidates: Candidates) -> np.ndarray:
    """Compute how much an answer is expected to take from the variance of all predictions, [N].

    With p = sigma(m) and w = p (1 - p), the answer to pair i changes S to S' = S - w_i S x_i x_i' S /
    (1 + w_i x_i' S x_i), the Laplace posterior of a logistic model, and the variance of p_j is w_j^2 x_j' S
    x_j. The sum over j is what the Brier score of the candidates is expected to lose (an I-optimal design;
    Cohn, Ghahramani and Jordan 1996, arXiv cs/9603104). Unlike information, it does not count what matters
    for few pairs.
    """
    p = 1 / (1 + np.exp(-candidates.attenuated))
    w = p * (1 - p)
    covariances = candidates.slopes @ candidates.spreads.T  # of m_j and m_i
    together = ((w[:, None] * covariances) ** 2).sum(axis=0)
    return np.asarray(together * w / (1 + w * candidates.variances))


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
            see `information_gain`; ``prediction``, see `brier_reduction`; or ``variety``, see
            `most_different`.
        generator: for ``random``. asked: slopes of the pairs asked before, for ``variety``; None: none.
    """
    if rule == "random":
        return int(generator.integers(len(candidates.margins)))
    if rule == "information":
        return int(information_gain(candidates.margins, candidates.variances).argmax())
    if rule == "prediction":
        return int(brier_reduction(candidates).argmax())
    if rule == "variety":
        before = candidates.slopes[:0] if asked is None else asked
        return most_different(candidates.slopes, before)
    return int(np.abs(candidates.attenuated).argmin())
