"""People who differ in three directions of sixteen features, and what a method makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plrhf.data.dataset import PairDataset, TextValues

N_USERS, N_NEW, N_PAIRS, WIDTH, N_TASTES = 60, 40, 240, 16, 3
N_TRAIN, N_TEST, N_GIVEN = 40, 20, 16


@dataclass(frozen=True)
class World:
    """Features [n, 2, 16] of chosen and rejected texts, of each user.

    Attributes:
        train, test: of train users. given, asked: of new users.
    """

    train: list[Tensor]
    test: list[Tensor]
    given: list[Tensor]
    asked: list[Tensor]


@dataclass(frozen=True)
class Accuracies:
    """Shares of right predictions, of train users' test pairs and of what new users are asked."""

    seen: float
    new: float


def make_rows(seed: int) -> tuple[list[dict[str, str]], Tensor]:
    """Draw the rows of all users and the features [2 N_PAIRS, 16] of the texts, which are numbers."""
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(2 * N_PAIRS, WIDTH))
    shared = draw.normal(size=WIDTH) * 0.3
    directions = draw.normal(size=(N_TASTES, WIDTH)) / WIDTH**0.5
    rows = []
    for user in range(N_USERS + N_NEW):
        taste = shared + draw.normal(size=N_TASTES) * 2.0 @ directions
        parts = ["train"] * N_TRAIN + ["test"] * N_TEST
        if user >= N_USERS:
            parts = ["test"] * (N_GIVEN + N_TEST)
        pairs = draw.permutation(N_PAIRS)[: len(parts)]
        for pair, split in zip(pairs.tolist(), parts, strict=True):
            first, second = 2 * pair, 2 * pair + 1
            margin = (features[first] - features[second]) @ taste
            wins = draw.random() < 1 / (1 + np.exp(-margin))
            chosen, rejected = (first, second) if wins else (second, first)
            who = {"user_id": f"user {user}", "pair_id": f"{user} {pair}", "split": split}
            rows.append({"prompt": "p", "chosen": str(chosen), "rejected": str(rejected), **who})
        if user < N_USERS:  # one pair for val, which nothing is chosen by
            rows.append({**rows[-1], "pair_id": f"{user} val", "split": "val"})
    return rows, torch.tensor(features, dtype=torch.float32)


def set_features(dataset: PairDataset, features: Tensor) -> None:
    """Give a dataset the features of its texts."""
    pairs = [[int(row.chosen), int(row.rejected)] for row in dataset.rows]
    dataset.hidden = TextValues(features, torch.tensor(pairs).view(-1, 2))


def of_users(dataset: PairDataset, features: Tensor) -> list[Tensor]:
    """Return the features of each user's pairs, by user index."""
    by_user: dict[int, list[list[int]]] = {}
    for row, user in zip(dataset.rows, dataset.user_id.tolist(), strict=True):
        by_user.setdefault(user, []).append([int(row.chosen), int(row.rejected)])
    return [features[torch.tensor(by_user[user])] for user in sorted(by_user)]
