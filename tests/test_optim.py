"""Learning rates, decay and schedule."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import pytest
import torch
from torch import nn

from plrhf.optim import Optim


def weight(*, trainable: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.ones(2), requires_grad=trainable)


def test_groups_and_their_settings() -> None:
    lora, frozen, user, head = weight(), weight(trainable=False), weight(), weight()
    settings = Optim(
        lr=1.0, user_lr=2.0, head_lr=3.0, weight_decay=0.1, user_weight_decay=0.2, warmup_steps=0
    )
    optimizer, _ = settings.build(
        backbone=iter([lora, frozen]), user=[user], head=[head], total_steps=10
    )
    found = {
        group["name"]: (group["params"], group["initial_lr"], group["weight_decay"])
        for group in optimizer.param_groups
    }
    assert found == {
        "lm": ([lora], 1.0, 0.1),
        "user": ([user], 2.0, 0.2),
        "head": ([head], 3.0, 0.1),
    }


def test_parts_without_weights_make_no_group() -> None:
    optimizer, _ = Optim().build(
        backbone=[weight(trainable=False)], user=(), head=[weight()], total_steps=10
    )
    assert [group["name"] for group in optimizer.param_groups] == ["head"]


def test_schedule_by_hand() -> None:
    factor = Optim(warmup_steps=3).factor(total_steps=7)
    # A quarter a step up to 1, then half a cosine over the 4 steps that are left.
    expected = [0.25, 0.5, 0.75] + [0.5 * (1 + cos(pi * done / 4)) for done in (0, 1, 2, 3, 4)]
    assert [factor(step) for step in range(8)] == pytest.approx(expected)
    assert factor(100) == pytest.approx(0.0)


def test_constant_schedule() -> None:
    factor = Optim(warmup_steps=1, schedule="constant").factor(total_steps=5)
    assert [factor(step) for step in (0, 1, 2, 99)] == [0.5, 1.0, 1.0, 1.0]


def test_a_run_shorter_than_its_warm_up() -> None:
    factor = Optim(warmup_steps=150).factor(total_steps=20)
    assert factor(19) == pytest.approx(20 / 151)


def test_every_rate_follows_the_schedule() -> None:
    settings = Optim(lr=1.0, user_lr=2.0, head_lr=4.0, warmup_steps=1, schedule="constant")
    parts = weight(), weight(), weight()
    optimizer, schedule = settings.build(
        backbone=[parts[0]], user=[parts[1]], head=[parts[2]], total_steps=5
    )
    rates = []
    for _ in range(2):
        rates.append([group["lr"] for group in optimizer.param_groups])
        for one in parts:
            one.grad = torch.ones(2)
        optimizer.step()
        schedule.step()
    assert rates == [[0.5, 1.0, 2.0], [1.0, 2.0, 4.0]]
    # Adam's first steps are as long as its rate: 1 - 0.5 - 1 and so on.
    assert [one[0].item() for one in parts] == pytest.approx([-0.5, -2.0, -5.0], abs=1e-5)


BAD = [
    ({"lr": 0.0}, "optim.lr=0.0 is not allowed: expected a number above 0. Set optim.lr=1e-4."),
    (
        {"user_lr": -1.0},
        "optim.user_lr=-1.0 is not allowed: expected a number above 0. Set optim.user_lr=1e-4.",
    ),
    (
        {"head_lr": float("nan")},
        "optim.head_lr=nan is not allowed: expected a number above 0. Set optim.head_lr=1e-4.",
    ),
    (
        {"weight_decay": -0.1},
        "optim.weight_decay=-0.1 is not allowed: expected a number from 0. "
        "Set optim.weight_decay=0.",
    ),
    (
        {"user_weight_decay": -0.1},
        "optim.user_weight_decay=-0.1 is not allowed: expected a number from 0. "
        "Set optim.user_weight_decay=0.",
    ),
    (
        {"warmup_steps": -1},
        "optim.warmup_steps=-1 is not allowed: expected a number from 0. Set optim.warmup_steps=0.",
    ),
    (
        {"schedule": "linear"},
        "optim.schedule='linear' is not allowed: expected cosine or constant. "
        "Set optim.schedule=cosine.",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Optim(**settings)
    assert str(caught.value) == message
