"""GPO: class GPO of models/gpo.py, on 1 to 16 pairs of a person as context and 16 others as targets.

Both responses of a pair are context points, with y = 1 and 0, and a target question has two
options; their Normal likelihood of these is the loss. Width, heads and depth are ours here (32, one, two
layers), Adam at 1e-3 for as many pairs.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from copies import OnCpu, load
from torch import Tensor
from world import WIDTH, Accuracies, World

OURS: tuple[str, list[str]] = ("gpo", [])
STEPS, TARGETS, MOST = 400, 16, 16


def theirs(copy: Path, world: World) -> Accuracies:
    gpo = load(copy, "models.gpo", without=("attrdict",))
    gpo.AttrDict = SimpleNamespace
    load(copy, "models.tnp").torch = OnCpu()
    model = gpo.GPO(WIDTH, 1, 32, 4, 32, 1, 0.0, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    y = torch.tensor([[1.0], [0.0]])

    def points(pairs: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = torch.stack(pairs).flatten(1, 2)  # [B, 2 n, d]
        return x, y.repeat(x.shape[1] // 2, 1).expand(len(x), -1, -1)

    for _ in range(STEPS):
        n_given = int(torch.randint(1, MOST + 1, ()))
        orders = [torch.randperm(len(own)) for own in world.train]
        of_context = [own[o[:n_given]] for own, o in zip(world.train, orders, strict=True)]
        of_target = [
            own[o[n_given : n_given + TARGETS]] for own, o in zip(world.train, orders, strict=True)
        ]
        (xc, yc), (xt, yt) = points(of_context), points(of_target)
        batch = {"xc": xc, "yc": yc, "xt": xt, "yt": yt, "tarqlen": [[2] * TARGETS] * len(xt)}
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
    model.eval()

    @torch.no_grad()
    def accuracy(pairs: list[Tensor], given: list[Tensor]) -> float:
        (xc, yc), (xt, yt) = points([one[:MOST] for one in given]), points(pairs)
        encoded = model.encode({"xc": xc, "yc": yc, "xt": xt, "yt": torch.zeros_like(yt)})
        means = model.predictor(encoded)[..., 0].unflatten(1, (-1, 2))
        return float((means[..., 0] > means[..., 1]).float().mean())

    return Accuracies(accuracy(world.test, world.train), accuracy(world.asked, world.given))
