"""GRPO's parts: advantages, clipping and KL by hand; the KL estimate against the exact divergence."""

from __future__ import annotations

from math import log, sqrt

import pytest
import torch
from torch import Tensor, tensor

from plrhf.core import policy_gradient as grpo


def test_advantages_by_hand() -> None:
    rewards = tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])  # mean 3: -2, -1, 3; squares 14, over 2: 7
    centred = tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(grpo.group_advantages(rewards, kind="dr_grpo"), centred)
    found = grpo.group_advantages(rewards, kind="grpo")
    torch.testing.assert_close(found, centred / sqrt(7), rtol=1e-4, atol=0)
    far = grpo.group_advantages(rewards + 100, kind="grpo")  # the level of a group does not count
    torch.testing.assert_close(far, found, rtol=1e-5, atol=0)


CLIPPED = [  # ratio, advantage, value, whether its gradient is cut off; bounds 0.2 and 0.5
    (1.0, 2.0, 2.0, False),
    (1.4, 2.0, 2.8, False),
    (1.6, 2.0, 3.0, True),  # likelier than 1.5 times is not rewarded
    (1.6, -2.0, -3.2, False),
    (0.7, -2.0, -1.6, True),  # rarer than 0.8 times is not rewarded
    (0.7, 2.0, 1.4, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "value", "is_cut"), CLIPPED)
def test_clipping_by_hand(ratio: float, advantage: float, value: float, is_cut: bool) -> None:
    at = tensor([ratio], requires_grad=True)
    found = grpo.clipped_surrogate(at, tensor([advantage]), clip_low=0.2, clip_high=0.5)
    torch.testing.assert_close(found, tensor([value]))
    found.sum().backward()
    assert at.grad is not None and at.grad.item() == (0.0 if is_cut else advantage)


def test_kl_estimate_by_hand() -> None:
    # q/p = 2, 1/2, 1: 2 - ln 2 - 1, 1/2 + ln 2 - 1, 0
    found = grpo.kl_estimate(tensor([-1.0, -1.0, -3.0]), tensor([log(2) - 1, -log(2) - 1, -3.0]))
    torch.testing.assert_close(found, tensor([1 - log(2), log(2) - 0.5, 0.0]))


def test_kl_estimate_is_unbiased() -> None:
    policy, reference = (torch.randn(11, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum()
    mean = (policy.exp() * grpo.kl_estimate(policy, reference)).sum()
    torch.testing.assert_close(mean, exact)


def test_token_losses_by_hand() -> None:
    # ratio 2, clipped at 1.5, advantage 3: 4.5; q/p = 1/2, so the KL estimate is ln 2 - 1/2.
    one: Tensor = tensor([-1.0])
    found = grpo.token_losses(
        *(one, one - log(2), one - log(2), tensor([3.0])), beta=0.1, clip_low=0.2, clip_high=0.5
    )
    torch.testing.assert_close(found, tensor([0.1 * (log(2) - 0.5) - 4.5]))


def test_response_losses_by_hand() -> None:
    sums, lengths = tensor([[6.0, 1.0]]), tensor([[3.0, 0.0]])
    found = {
        kind: grpo.response_losses(sums, lengths, kind=kind, max_tokens=12).tolist()
        for kind in ("grpo", "dr_grpo")
    }
    assert found == {"grpo": [[2.0, 1.0]], "dr_grpo": [[0.5, pytest.approx(1 / 12)]]}
