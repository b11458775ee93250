"""PReF: SVD_for_sparse_matrix and calculate_loss_MLE of PReF_code/utils/training.py, with five
features.

Their language model is left out: a response's features go to the linear head at once. As theirs,
users start at V sqrt(S) and the head regresses U sqrt(S); then SGD on both. Their learning rate of
1e-3 is for a language model and moves a head on 16 numbers by little, so it is 1 here, for as many
full batches as ours has steps. New users: 1000 steps of gradient descent at 0.01 from a random
start, no penalty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from copies import OnCpu, load
from torch import Tensor
from world import N_PAIRS, WIDTH, Accuracies, World

RANK, STEPS = 5, 400
OURS = (
    "pref",
    [
        "aggregator.layer_width=null",
        f"aggregator.user_dim={RANK}",
        "optim.weight_decay=0.0",
        "optim.user_lr=1e-2",
    ],
)


class Features(torch.nn.Module):
    """Their Model without its language model: users and a linear head."""

    def __init__(self, users: Tensor, head: Tensor) -> None:
        super().__init__()
        self.users, self.head = torch.nn.Parameter(users), torch.nn.Parameter(head)

    def forward(
        self, one: Tensor, other: Tensor, *, return_features: bool
    ) -> tuple[Tensor, Tensor]:
        features = (one - other) @ self.head.T
        return features @ self.users.T, features


def theirs(copy: Path, world: World) -> Accuracies:
    training = load(copy / "PReF_code", "utils.training", without=("wandb", "hydra", "omegaconf"))
    training.torch = OnCpu()
    items: dict[Any, int] = {}
    table, differences = (
        torch.full((len(world.train), N_PAIRS), torch.nan),
        torch.zeros(N_PAIRS, WIDTH),
    )
    for user, pairs in enumerate(world.train):
        for chosen, rejected in pairs:
            is_first = bool(chosen[0] > rejected[0])
            first, second = (chosen, rejected) if is_first else (rejected, chosen)
            item = items.setdefault((first[0].item(), second[0].item()), len(items))
            table[user, item], differences[item] = float(is_first), first - second
    known, of_item = len(items), differences[: len(items)]
    u, s, v = training.SVD_for_sparse_matrix(table[:, :known].T.numpy(), N=10, feature_dim=RANK)
    root = torch.from_numpy(s[:RANK]).sqrt()
    targets, users = torch.from_numpy(u[:, :RANK]) * root, torch.from_numpy(v[:RANK]).T * root
    head = torch.linalg.lstsq(of_item, targets).solution.T
    model = Features(users.contiguous(), head.contiguous())

    def fit(
        one: Features, pairs: list[Tensor], parameters: Any, *, lr: float, steps: int, l2: Any
    ) -> None:
        both, owners = torch.cat(pairs), [n for n, own in enumerate(pairs) for _ in own]
        wanted, optimizer = torch.ones(len(both)), torch.optim.SGD(parameters, lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = training.calculate_loss_MLE(
                one, wanted, both[:, 0], both[:, 1], owners, False, l2, None if l2 is None else 0.02
            )
            loss.backward()
            optimizer.step()

    def accuracy(one: Features, pairs: list[Tensor]) -> float:
        found = [
            ((p[:, 0] - p[:, 1]) @ one.head.T) @ w for p, w in zip(pairs, one.users, strict=True)
        ]
        return float((torch.cat(found) > 0).float().mean())

    fit(model, world.train, model.parameters(), lr=1.0, steps=STEPS, l2="l2")
    new = Features(torch.randn(len(world.given), RANK), model.head.detach())
    # A mean over all new users' pairs: each one's own gradient is smaller by their number.
    fit(new, world.given, [new.users], lr=0.01 * len(world.given), steps=1000, l2=None)
    return Accuracies(accuracy(model, world.test), accuracy(new, world.asked))
