"""The optimiser of a stack against torch's, one trial each."""

from __future__ import annotations

import torch
from torch import nn

from plrhf.referee.stacked_optim import StackedAdamW, clip


def test_stacked_adamw_is_torchs() -> None:
    rates, decays = torch.tensor([0.1, 0.03]), torch.tensor([0.0, 0.7])
    start = torch.randn(2, 3, 4)
    stacked = {"w": start.clone()}
    ours = StackedAdamW(stacked, rates={"w": rates}, decays={"w": decays})
    singles = [nn.Parameter(one.clone()) for one in start]
    theirs = [
        torch.optim.AdamW([one], lr=float(rate), weight_decay=float(decay))
        for one, rate, decay in zip(singles, rates, decays, strict=True)
    ]
    for _ in range(5):
        gradient = torch.randn(2, 3, 4)
        ours.step({"w": gradient.clone()}, {"w": torch.ones(2)})
        for one, optimizer, own in zip(singles, theirs, gradient, strict=True):
            one.grad = own.clone()
            optimizer.step()
    torch.testing.assert_close(stacked["w"], torch.stack([one.detach() for one in singles]))


def test_clipping_is_torchs_for_each_trial() -> None:
    gradients = {"a": torch.randn(2, 3), "b": torch.randn(2, 4, 1)}
    gradients["a"][1] *= 1e-3
    gradients["b"][1] *= 1e-3
    expected = []
    for trial in range(2):
        own = [nn.Parameter(torch.zeros_like(one[trial])) for one in gradients.values()]
        for parameter, one in zip(own, gradients.values(), strict=True):
            parameter.grad = one[trial].clone()
        nn.utils.clip_grad_norm_(own, 0.5)
        expected.append([one.grad for one in own])
    clip(gradients, 0.5)
    for trial in range(2):
        for found, wanted in zip(gradients.values(), expected[trial], strict=True):
            torch.testing.assert_close(found[trial], wanted)
