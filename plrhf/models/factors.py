"""Principal directions of train pairs, and factors of what users chose."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator, svds
from torch import Tensor

from plrhf.core.errors import bad_value
from plrhf.data.dataset import PairDataset

IMPUTING_ROUNDS = 10
"""Number of rounds in which gaps of the matrix of judgments are imputed, as in PReF's code."""

Factors = tuple[Tensor, Tensor]


def principal_directions(differences: Tensor, n: int) -> Tensor:
    """Return the n directions of largest second moment of `differences` [N, d], scaled to unit margins.

    Unit margins have variance 1. The sign makes most margins positive.
    """
    values, vectors = torch.linalg.eigh(differences.T @ differences / len(differences))
    directions = vectors.flip(1).T[:n] / values.flip(0)[:n, None].clamp(min=1e-12).sqrt()
    signs = (differences @ directions.T).sign().sum(0).sign()
    return directions * torch.where(signs == 0, 1.0, signs)[:, None]


def are_judged_by_several_users(pairs: PairDataset) -> bool:
    """Return whether most train pairs are of two texts that several users have judged."""
    assert pairs.hidden is not None
    texts = pairs.hidden.of_pair.sort(dim=1).values
    _, which = texts.unique(dim=0, return_inverse=True)
    judged = torch.stack([which, pairs.user_id], dim=1).unique(dim=0)[:, 0]
    users_of_texts = judged.bincount(minlength=int(which.max()) + 1)
    return bool((users_of_texts[which] > 1).float().mean() > 0.5)


def factors_of_judgments(
    pairs: PairDataset, differences: Tensor, *, n_users: int, rank: int, ridge: float
) -> tuple[Tensor, Tensor]:
    """Factorise the matrix of users by pairs of texts, with entries 1, -1, and 0 for no judgment.

    Returns:
        Users [n_users, rank] and directions [rank, d].
    """
    assert pairs.hidden is not None
    texts, order = pairs.hidden.of_pair.sort(dim=1)
    _, which = texts.unique(dim=0, return_inverse=True)
    sign = (1 - 2 * order[:, 0]).double()  # 1 where the chosen text comes first
    n_items = int(which.max()) + 1
    at, several = ((pairs.user_id - 1) * n_items + which).unique(return_inverse=True)
    told = torch.zeros(len(at), dtype=torch.float64).index_add_(0, several, sign).clamp(-1, 1)
    row, column = at // n_items, at % n_items

    def sparse(values: Tensor) -> LinearOperator:
        where = (row.numpy(), column.numpy())
        return aslinearoperator(csr_array((values.numpy(), where), shape=(n_users, n_items)))

    filled = sparse(told)  # the matrix itself would have few known entries among millions
    for _ in range(IMPUTING_ROUNDS):
        users, sizes, items = truncated_svd(filled, rank)
        guessed = ((users * sizes)[row] * items.T[column]).sum(dim=1)
        low_rank = aslinearoperator((users * sizes).numpy()) @ aslinearoperator(items.numpy())
        filled = low_rank + sparse(told - guessed)
    of_item = torch.zeros(n_items, differences.shape[1], dtype=torch.float64)
    of_item[which] = sign[:, None] * differences
    gram = of_item.T @ of_item + ridge * torch.eye(of_item.shape[1], dtype=torch.float64)
    basis = torch.linalg.solve(gram, of_item.T @ (sizes.sqrt()[:, None] * items).T).T
    return users * sizes.sqrt(), basis


def factors_of_coefficients(
    pairs: PairDataset, differences: Tensor, *, n_users: int, rank: int, ridge: float
) -> tuple[Tensor, Tensor]:
    """Factorise the matrix of each user's ridge regression coefficients.

    Each regression predicts 1 from the user's `differences`.

    Returns:
        Users [n_users, rank] and directions [rank, d].
    """
    order = pairs.user_id.argsort(stable=True)
    counts = pairs.user_id.bincount(minlength=n_users + 1).tolist()
    coefficients = torch.zeros(n_users, differences.shape[1], dtype=torch.float64)
    for user, own in enumerate(differences[order].split(counts)):
        if user > 0 and len(own) > 0:
            gram = own @ own.T + ridge * torch.eye(len(own), dtype=torch.float64)
            weights = torch.linalg.solve(gram, torch.ones(len(own), dtype=torch.float64))
            coefficients[user - 1] = own.T @ weights
    users, sizes, directions = truncated_svd(coefficients, rank)
    return users * sizes.sqrt(), sizes.sqrt()[:, None] * directions


def truncated_svd(matrix: Tensor | LinearOperator, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first `rank` left vectors, singular values and right vectors of a matrix."""
    if rank > min(matrix.shape):
        allowed = f"at most {min(matrix.shape)}, the smaller side of a matrix {tuple(matrix.shape)}"
        raise bad_value("aggregator.user_dim", rank, allowed, "Set a smaller aggregator.user_dim")
    if rank >= min(matrix.shape) // 4:
        whole = matrix if isinstance(matrix, Tensor) else torch.from_numpy(dense(matrix))
        left, sizes, right = torch.linalg.svd(whole, full_matrices=False)
        return left[:, :rank], sizes[:rank], right[:rank]
    # Of a thousand users by tens of thousands of pairs, a few vectors cost a small part of all.
    first = np.random.default_rng(0).standard_normal(min(matrix.shape))
    plain = matrix.numpy() if isinstance(matrix, Tensor) else matrix
    found = svds(plain, k=rank, v0=first)  # the smallest singular value first
    left, sizes, right = (torch.from_numpy(part.copy()) for part in found)
    return left.flip(1), sizes.flip(0), right.flip(0)


def dense(operator: LinearOperator) -> np.ndarray:
    """Return the whole matrix of a linear operator."""
    rows, columns = operator.shape
    if rows < columns:
        return np.asarray((operator.T @ np.eye(rows)).T)
    return np.asarray(operator @ np.eye(columns))
