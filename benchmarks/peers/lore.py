"""LoRe: classes LoRe and PersonalizeBatch of utils.py, with the settings of their TLDR script and K =
5.
"""

from __future__ import annotations

from pathlib import Path

import torch
from copies import load
from world import WIDTH, Accuracies, World

K = 5
OURS = (
    "lore",
    [
        "aggregator.layer_width=null",
        f"aggregator.user_dim={K}",
        "optim.weight_decay=0.0",
        "optim.user_lr=0.25",  # a person is e_0 + o_u, and both move
        "trainer.max_steps=1000",
    ],
)


def theirs(copy: Path, world: World) -> Accuracies:
    utils = load(copy, "utils")

    def differences(pairs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [one[:, 0] - one[:, 1] for one in pairs]

    n_users, n_new = len(world.train), len(world.given)
    shared = utils.LoRe(torch.zeros(WIDTH), 0.0, n_users, WIDTH, K, 1000, 0.5)
    weights, basis = shared.train(differences(world.train))
    fitted = utils.PersonalizeBatch(n_new, WIDTH, K, 500, 0.1)
    new = fitted.train(differences(world.given), basis.detach())

    def accuracy(pairs: list[torch.Tensor], of_users: list[torch.Tensor]) -> float:
        margins = [one @ basis @ w for one, w in zip(differences(pairs), of_users, strict=True)]
        return float((torch.cat(margins) > 0).float().mean())

    return Accuracies(accuracy(world.test, list(weights)), accuracy(world.asked, new))
