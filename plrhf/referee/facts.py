"""What is known of rows before any method: pairs nearly all agree on, directions in which people differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from plrhf.core.bootstrap import Array
from plrhf.data.dataset import PairDataset
from plrhf.data.rows import Row

LEAST_JUDGES, NEARLY_ALL = 5, 0.9
MOST_DIRECTIONS = 32
N_SHUFFLES = 20


@dataclass(frozen=True)
class Facts:
    """Facts of some rows.

    Attributes:
        agreed: ids of pairs that nearly all who judged them judge alike.
        span: see `span`.
    """

    agreed: set[str]
    span: dict[str, Any]


def agreed_pairs(rows: Iterable[Row]) -> set[str]:
    """Return ids of pairs that at least `LEAST_JUDGES` people judged and `NEARLY_ALL` of them alike.

    Personalising must not lose them (the safety tax of Dong et al. 2025, arXiv 2502.19158).
    """
    judged: dict[Any, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        texts = tuple(sorted((row.chosen, row.rejected)))
        judged[row.prompt_id, texts].append((row.pair_id, row.chosen))
    agreed: set[str] = set()
    for found in judged.values():
        counts: dict[str, int] = defaultdict(int)
        for _, chosen in found:
            counts[chosen] += 1
        if len(found) >= LEAST_JUDGES and max(counts.values()) >= NEARLY_ALL * len(found):
            agreed.update(pair_id for pair_id, _ in found)
    return agreed


def span(train: PairDataset, *, seed: int = 0) -> dict[str, Any]:
    """Count the directions of the features in which people are seen to differ.

    New users can be told apart in every direction only if users' preferences span the features
    ("Personalized Alignment Revisited", arXiv 2605.09119). Features are the first `MOST_DIRECTIONS`
    principal components of chosen - rejected, scaled to variance 1. Each person's pairs are halved at
    random; m_u, m'_u are the mean differences of the halves less those of all people, and the
    eigenvalues of 1/U sum_u (m_u m'_u^T + m'_u m_u^T) / 2 are free of the noise of either half. A
    direction counts where its eigenvalue is above the largest of `N_SHUFFLES` tables whose second
    halves belong to somebody else.

    Returns:
        ``directions`` looked at, ``spanned`` of them, ``users`` with pairs in both halves.
    """
    assert train.hidden is not None
    values = train.hidden.values.double()
    differences = values[train.hidden.of_pair[:, 0]] - values[train.hidden.of_pair[:, 1]]
    _, vectors = torch.linalg.eigh(differences.T @ differences)
    kept = min(MOST_DIRECTIONS, vectors.shape[1])
    z = differences @ vectors[:, -kept:]
    z = (z / z.square().mean(dim=0).sqrt().clamp(min=1e-12)).numpy()
    rng = np.random.default_rng(seed)
    half = rng.integers(2, size=len(z))
    user = train.user_id.numpy()
    means, counts = zip(*(_means(z, user, half == one) for one in (0, 1)), strict=True)
    both = (counts[0] > 0) & (counts[1] > 0)
    first, second = (mean[both] - mean[both].mean(axis=0) for mean in means)
    if len(first) < 3:
        return {"directions": kept, "spanned": 0, "users": len(first)}
    chance = max(
        _eigenvalues(first, second[rng.permutation(len(second))]).max() for _ in range(N_SHUFFLES)
    )
    spanned = int((_eigenvalues(first, second) > chance).sum())
    return {"directions": kept, "spanned": spanned, "users": len(first)}


def _means(values: Array, user: np.ndarray, taken: np.ndarray) -> tuple[Array, Array]:
    n_users = int(user.max()) + 1
    count = np.bincount(user[taken], minlength=n_users).astype(float)
    total = np.zeros((n_users, values.shape[1]))
    np.add.at(total, user[taken], values[taken])
    return total / np.maximum(count, 1)[:, None], count


def _eigenvalues(first: Array, second: Array) -> Array:
    shared = first.T @ second / len(first)
    return np.asarray(np.linalg.eigvalsh((shared + shared.T) / 2))
