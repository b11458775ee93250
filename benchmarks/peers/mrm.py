"""MRM: classes MRM and RPO of train.py, two heads, two users a step, inner steps of Adam at the meta
rate.

Their inner step needs the package `higher`; it is written out here: Adam's first step from a weight
w with gradient g is w - lr g / (|g| + eps), differentiably. Their features are a language model's,
about 100 times as large, and rewards are divided by 100; the factor is left out. As theirs, the
last of the epochs is taken here, not the best on test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from copies import load
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import logsigmoid
from world import WIDTH, Accuracies, World

EPOCHS, LR = 20, 5e-3
OURS = ("mrm", ["aggregator.layer_width=null", "optim.head_lr=5e-3", "optim.weight_decay=0.0"])


def theirs(copy: Path, world: World) -> Accuracies:
    train: Any = load(copy, "train", without=("wandb", "higher", "tqdm"))
    model = train.MRM(WIDTH, [2], use_bias=False, scale=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def margins(weight: Tensor, pairs: Tensor) -> Tensor:
        rewards = functional_call(model, {"shared_weight": weight}, (pairs.flatten(0, 1),))
        return rewards.view(-1, 2)[:, 0] - rewards.view(-1, 2)[:, 1]

    def fitted(pairs: Tensor) -> Tensor:
        weight = model.shared_weight
        loss = -logsigmoid(margins(weight, pairs)).mean()
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        return weight - LR * gradient / ((gradient.square() + 1e-16).sqrt() + 1e-8)

    for _ in range(EPOCHS):
        losses = []
        for user in torch.randperm(len(world.train)).tolist():
            own = world.train[user][torch.randperm(len(world.train[user]))]
            n_support = len(own) // 10
            asked = margins(fitted(own[:n_support]), own[n_support:])
            losses.append(-logsigmoid(asked).mean())
            if len(losses) == 2:
                optimizer.zero_grad()
                train.RPO(torch.stack(losses), 0.5, 0.5).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses = []

    def accuracy(pairs: list[Tensor], given: list[Tensor]) -> float:
        found = [margins(fitted(g), own) for own, g in zip(pairs, given, strict=True)]
        return float((torch.cat(found) > 0).float().mean())

    return Accuracies(accuracy(world.test, world.train), accuracy(world.asked, world.given))
