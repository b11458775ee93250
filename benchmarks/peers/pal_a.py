"""PAL-A: Connector, CustomSoftMax, TensorInitializer and UserLearner_Pw, with two prototypes.

Their language model, Lightning module and loss at every token are left out: a response is its
features, its reward minus the distance that PrefLearner_dist computes, and the loss the hinge.
Learning rates and decay are theirs for prototypes and weights; the projector, which they train on
top of a language model at 1e-4, has 1e-3 on both sides here. New users: their weights alone, AdamW
at 5e-3, 20 epochs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from copies import load
from torch import Tensor
from world import WIDTH, Accuracies, World

DIM, HINGE_STEPS = 16, 400
OURS = (
    "pal_a",
    [
        f"aggregator.user_dim={DIM}",
        f"model.head.width={DIM}",
        "optim.head_lr=1e-3",
        "encoder.weight_scale=1.0",
        "encoder.init=uniform",  # prototypes about as long as theirs
    ],
)


def theirs(copy: Path, world: World) -> Accuracies:
    parts = {
        name: load(copy, f"src.{name}")
        for name in ("connector", "custom_sfx", "tensor_initializer")
    }
    learner = load(copy, "src.pal_rm_a.userLearner")
    project = parts["connector"].Connector(
        in_dims=WIDTH, out_dims=DIM, cnct_arch="mlp2-gelu-dropout0"
    )
    users = learner.UserLearner_Pw(
        d_q=WIDTH,
        d=DIM,
        k=2,
        learner_type="Pw",
        projector=project,
        tensor_initializer=parts["tensor_initializer"].TensorInitializer("gaussian", 42, True),
        softmax=parts["custom_sfx"].CustomSoftMax("softmax", 1.0, False),
    )
    users.init_weight([f"u{n}" for n in range(len(world.train))])
    users.init_weight([f"n{n}" for n in range(len(world.given))])

    def margins(prefix: str, pairs: list[Tensor]) -> Tensor:
        ids = [f"{prefix}{n}" for n, one in enumerate(pairs) for _ in one]
        points, both = users(ids), project(torch.cat(pairs).flatten(0, 1)).unflatten(0, (-1, 2))
        away = torch.linalg.norm(both - points[:, None], dim=-1)
        return away[:, 1] - away[:, 0]

    def fit(prefix: str, pairs: list[Tensor], optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            torch.relu(1 - margins(prefix, pairs)).mean().backward()
            optimizer.step()

    def weights(prefix: str) -> list[Tensor]:
        return [one for name, one in users.W.items() if name.startswith(prefix)]

    groups = [
        {"params": project.parameters(), "lr": 1e-3, "weight_decay": 0.01},
        {"params": [users.P, *weights("u")], "lr": 5e-3},
    ]
    fit("u", world.train, torch.optim.Adam(groups), HINGE_STEPS)
    fit("n", world.given, torch.optim.AdamW(weights("n"), lr=5e-3), 20)
    with torch.no_grad():
        return Accuracies(
            float((margins("u", world.test) > 0).float().mean()),
            float((margins("n", world.asked) > 0).float().mean()),
        )
