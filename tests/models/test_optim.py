"""Learning rates, decay and schedule."""

from __future__ import annotations

import copy
from math import cos, pi
from typing import Any

import pytest
import torch
from torch import nn

from plrhf.models.optim import Optim, RowAdamW, clip_gradients


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
        "backbone": ([lora], 1.0, 0.1),
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


def test_users_begin_after_what_all_share() -> None:
    optim = Optim(warmup_steps=1, schedule="constant", shared_steps=3, shrinkage_steps=4)
    assert [optim.factor(9, "head")(step) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]
    for part in ("user", "shrinkage"):
        assert [optim.factor(9, part)(step) for step in range(6)] == [0, 0, 0, 0.5, 1.0, 1.0]
    weights = [optim.shrinkage_factor(step) for step in range(9)]
    assert weights == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_constant_schedule() -> None:
    factor = Optim(warmup_steps=1, schedule="constant").factor(total_steps=5)
    assert [factor(step) for step in (0, 1, 2, 99)] == [0.5, 1.0, 1.0, 1.0]


def test_a_run_shorter_than_its_warm_up() -> None:
    factor = Optim(warmup_steps=150, schedule="constant").factor(total_steps=20)
    assert [factor(step) for step in (0, 1, 2, 19)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


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
    ({"lr": 0.0}, "optim.lr=0.0 is not allowed: expected a number above 0. Set optim.lr=5e-05."),
    (
        {"user_lr": -1.0},
        "optim.user_lr=-1.0 is not allowed: expected a number above 0. Set optim.user_lr=0.0005.",
    ),
    (
        {"head_lr": float("nan")},
        "optim.head_lr=nan is not allowed: expected a number above 0. Set optim.head_lr=0.001.",
    ),
    (
        {"weight_decay": -0.1},
        "optim.weight_decay=-0.1 is not allowed: expected a number from 0. "
        "Set optim.weight_decay=0.0.",
    ),
    (
        {"user_weight_decay": -0.1},
        "optim.user_weight_decay=-0.1 is not allowed: expected a number from 0. "
        "Set optim.user_weight_decay=0.0.",
    ),
    (
        {"warmup_steps": -1},
        "optim.warmup_steps=-1 is not allowed: expected a whole number from 0. "
        "Set optim.warmup_steps=150.",
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


def table_and_weight(*, sparse: bool) -> tuple[nn.Embedding, nn.Parameter, RowAdamW]:
    torch.manual_seed(0)
    table = nn.Embedding(7, 3, sparse=sparse)
    weight = nn.Parameter(torch.randn(3))
    groups = [
        {"params": [table.weight], "lr": 0.1, "weight_decay": 0.5},
        {"params": [weight], "lr": 0.01, "weight_decay": 0.0},
    ]
    return table, weight, RowAdamW(groups)


def step(table: nn.Embedding, weight: nn.Parameter, optimizer: RowAdamW, rows: list[int]) -> None:
    optimizer.apply_delayed_decay(torch.tensor(rows))
    optimizer.zero_grad()
    ((table(torch.tensor(rows)) @ weight).exp() * torch.arange(1, len(rows) + 1)).sum().backward()
    clip_gradients([table.weight, weight], 2.0)
    optimizer.step()


def test_rows_that_always_have_a_gradient_are_stepped_as_by_adamw() -> None:
    dense, sparse = (table_and_weight(sparse=kind) for kind in (False, True))
    for _ in range(6):
        for table, weight, optimizer in (dense, sparse):
            step(table, weight, optimizer, [0, 4, 1, 2, 2, 3, 5, 6])
    torch.testing.assert_close(sparse[0].weight, dense[0].weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(sparse[1], dense[1], atol=1e-6, rtol=0)


def test_rows_without_a_gradient_decay_and_wait() -> None:
    dense, sparse = (table_and_weight(sparse=kind) for kind in (False, True))
    start = dense[0].weight.detach().clone()
    for rows in ([1, 2], [2], [5, 2], [2, 2]):
        for table, weight, optimizer in (dense, sparse):
            step(table, weight, optimizer, rows)
    sparse[2].apply_delayed_decay()
    # Never seen: four steps of decay, as by dense AdamW. Always seen: the same as by dense AdamW.
    torch.testing.assert_close(sparse[0].weight[3], start[3] * (1 - 0.1 * 0.5) ** 4)
    for row in (0, 3, 4, 6, 2):
        torch.testing.assert_close(sparse[0].weight[row], dense[0].weight[row], atol=1e-6, rtol=0)
    # Seen in the third step only, by hand: decay, moments from zero, bias as after three steps.
    table = table_and_weight(sparse=True)
    for rows in ([2], [2]):
        step(*table, rows)
    table[2].apply_delayed_decay()
    before = table[0].weight[5].detach().clone()
    step(*table, [5])
    moment = table[2].state[table[0].weight]
    first, second = moment["exp_avg"][5] / (1 - 0.9**3), moment["exp_avg_sq"][5] / (1 - 0.999**3)
    by_hand = before * (1 - 0.1 * 0.5) - 0.1 * first / (second.sqrt() + 1e-8)
    torch.testing.assert_close(table[0].weight[5], by_hand)


def test_sparse_steps_go_on_from_a_checkpoint() -> None:
    whole, half = table_and_weight(sparse=True), table_and_weight(sparse=True)
    steps = [[1], [2, 4], [1, 3], [6]]
    for rows in steps:
        step(*whole, rows)
    for rows in steps[:2]:
        step(*half, rows)
    table, weight, optimizer = table_and_weight(sparse=True)
    table.load_state_dict(half[0].state_dict())
    weight.data.copy_(half[1].data)
    optimizer.load_state_dict(copy.deepcopy(half[2].state_dict()))
    for rows in steps[2:]:
        step(table, weight, optimizer, rows)
    optimizer.apply_delayed_decay()
    whole[2].apply_delayed_decay()
    assert table.weight.equal(whole[0].weight)


def test_clipping_is_torchs() -> None:
    gradients = []
    for sparse in (False, True):
        table, weight, _ = table_and_weight(sparse=sparse)
        (table(torch.tensor([1, 1, 4])) @ weight).sum().backward()
        clip = clip_gradients if sparse else nn.utils.clip_grad_norm_
        clip([table.weight, weight], 0.3)
        found = table.weight.grad
        assert found is not None and weight.grad is not None
        gradients.append((found.to_dense() if sparse else found, weight.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
