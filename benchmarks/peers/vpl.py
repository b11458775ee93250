"""VPL: VAEModel of hidden_context/vae_utils.py on contexts of 2 to 8 of each user's train pairs.

Their Trainer is left out: the loss is Bradley-Terry and their KL weighted by 1e-4, without its
cycles, and Adam takes as many steps as ours, on as many pairs. Ours has their decoder in the place
of FiLM, and 32 numbers and 64 units as theirs here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from copies import load
from torch import Tensor
from torch.nn.functional import logsigmoid
from world import WIDTH, Accuracies, World

LATENT, HIDDEN, STEPS, LR, KL = 32, 64, 400, 1e-3, 1e-4
OURS = (
    "vpl",
    [
        *("aggregator=none", "~aggregator.site", "aggregator.layer_width=null"),
        f"aggregator.user_dim={LATENT}",
        *(
            "model.head={name: decoder, width: 64}",
            f"encoder.width={HIDDEN}",
            f"encoder.kl_weight={KL}",
        ),
        *("optim.weight_decay=0.0", f"optim.user_lr={LR}", f"optim.head_lr={LR}"),
        "data.batch_size=300",
    ],
)


def theirs(copy: Path, world: World) -> Accuracies:
    module = load(copy, "hidden_context.vae_utils", without=("wandb",))
    model = module.VAEModel(WIDTH, WIDTH, HIDDEN, LATENT, None, None)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def margins(asked: Tensor, contexts: list[Tensor]) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([len(one) for one in contexts]).cumsum(0).tolist()
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        context = torch.cat(contexts)
        chosen, rejected, mean, log_variance, _ = model(
            asked[:, 0], asked[:, 1], context[:, 0], context[:, 1], spans, None
        )
        kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
        return (chosen - rejected)[:, 0], kl

    for _ in range(STEPS):
        asked, contexts = [], []
        for own in world.train:
            for _ in range(5):  # of 60 users: 300 pairs, as ours
                order = torch.randperm(len(own))
                asked.append(own[order[0]])
                contexts.append(own[order[1 : 1 + int(torch.randint(2, 9, ()))]])
        found, kl = margins(torch.stack(asked), contexts)
        loss = -logsigmoid(found).mean() + KL * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    @torch.no_grad()
    def accuracy(pairs: list[Tensor], given: list[Tensor], most: int) -> float:
        contexts = [g[:most] for own, g in zip(pairs, given, strict=True) for _ in own]
        return float((margins(torch.cat(pairs), contexts)[0] > 0).float().mean())

    return Accuracies(accuracy(world.test, world.train, 8), accuracy(world.asked, world.given, 16))
