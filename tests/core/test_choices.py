"""Likelihoods of ties and errors, against hand-worked numbers and against what they must come to."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor, tensor

from plrhf.core.choices import (
    cumulative_logit,
    davidson,
    margins_with_errors,
    plackett_luce,
)
from plrhf.core.losses import bradley_terry


def test_davidson_by_hand() -> None:
    # pi = 4 and 1, nu = 3: 4 : 1 : 3 sqrt(4) = 4 : 1 : 6, so the probabilities are 4/11, 1/11, 6/11.
    margins, is_tie = tensor([log(4), -log(4), log(4)]), tensor([False, False, True])
    expected = tensor([log(11 / 4), log(11), log(11 / 6)])
    torch.testing.assert_close(davidson(margins, tensor(log(3)), is_tie), expected)


def test_outcomes_exclude_one_another() -> None:
    margins = torch.linspace(-30, 30, 13, dtype=torch.float64)
    for log_tie in (-5.0, 0.0, 4.0):
        given = torch.tensor(log_tie, dtype=torch.float64)
        outcomes = [(margins, False), (-margins, False), (margins, True)]
        found = [davidson(m, given, torch.tensor(is_tie)) for m, is_tie in outcomes]
        total = torch.stack(found).neg().exp().sum(0)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_without_ties_it_is_bradley_terry() -> None:
    margins = torch.linspace(-20, 20, 41, dtype=torch.float64).requires_grad_()
    found = davidson(margins, tensor(-40.0, dtype=torch.float64), tensor(False))
    expected = bradley_terry(margins)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(found.sum(), margins)
    (wanted,) = torch.autograd.grad(expected.sum(), margins)
    torch.testing.assert_close(slope, wanted, atol=1e-6, rtol=0)


def test_margins_with_errors_by_hand() -> None:
    # sigma(log 3) = 3/4 and e = 1/5: 4/5 * 3/4 + 1/10 = 7/10, log-odds log(7/3).
    found = margins_with_errors(tensor([log(3), -log(3), 0.0]), tensor(log(1 / 4)))
    torch.testing.assert_close(found, tensor([log(7 / 3), -log(7 / 3), 0.0]))
    huge = margins_with_errors(tensor([90.0, -90.0]), tensor(log(1 / 4)))
    torch.testing.assert_close(huge, tensor([log(9), -log(9)]))  # log((2 - e) / e)


def test_somebody_without_errors_has_the_same_margins() -> None:
    margins = tensor([-3.0, 0.5, 7.0])
    torch.testing.assert_close(margins_with_errors(margins, tensor(-40.0)), margins)


def naive_plackett_luce(rewards: Tensor) -> Tensor:
    """Loss of a ranking with these rewards, the best response first, [k]."""
    return sum((rewards[j:].logsumexp(0) - rewards[j] for j in range(len(rewards))), tensor(0.0))


def pairs_of(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Margins of all pairs of a ranking, and which response was chosen in each."""
    pairs = [(i, j) for i in range(len(rewards)) for j in range(i + 1, len(rewards))]
    margins = torch.stack([rewards[i] - rewards[j] for i, j in pairs])
    return margins, tensor([i for i, _ in pairs])


def test_plackett_luce_by_hand() -> None:
    # e^r = 4, 2, 1 and 3, 5: 4/7 * 2/3 for the ranking and 3/8 for the pair.
    margins, choice = pairs_of(tensor([4.0, 2.0, 1.0]).log())
    margins, choice = torch.cat([margins, tensor([log(3 / 5)])]), torch.cat([choice, tensor([2])])
    found = plackett_luce(margins, choice)
    expected = tensor([log(7 / 4) / 2, log(7 / 4) / 2, log(3 / 2), log(8 / 3)])
    torch.testing.assert_close(found, expected)


def test_plackett_luce_equals_the_product_of_choices() -> None:
    torch.manual_seed(0)
    rewards = (5 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    expected = naive_plackett_luce(rewards)
    found = plackett_luce(*pairs_of(rewards)).sum()
    torch.testing.assert_close(found, expected)
    (wanted,) = torch.autograd.grad(expected, rewards)
    (slope,) = torch.autograd.grad(found, rewards)
    torch.testing.assert_close(slope, wanted)


def test_rankings_of_two_are_bradley_terry() -> None:
    margins = torch.linspace(-20, 20, 41).expand(2, -1).clone().requires_grad_()
    found = plackett_luce(margins, torch.arange(41))
    expected = bradley_terry(margins)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(found.sum(), margins)
    (wanted,) = torch.autograd.grad(expected.sum(), margins)
    torch.testing.assert_close(slope, wanted, atol=1e-6, rtol=0)


def test_cumulative_logit_by_hand() -> None:
    # theta - r = log 1/3, 0, log 4: sigma = 1/4, 1/2, 4/5, so the levels have 1/4, 1/4, 3/10, 1/5.
    thresholds = tensor([log(1 / 3), 0.0, log(4)]) + 2.5
    found = cumulative_logit(tensor([2.5] * 4), torch.arange(4), thresholds.expand(4, 3))
    torch.testing.assert_close(found.neg().exp(), tensor([0.25, 0.25, 0.3, 0.2]))


def test_levels_exclude_one_another() -> None:
    latent = torch.linspace(-30, 30, 13, dtype=torch.float64)
    thresholds = tensor([-2.0, -1.5, 4.0], dtype=torch.float64).expand(13, 3)
    found = [cumulative_logit(latent, tensor([level]), thresholds) for level in range(4)]
    total = torch.stack(found).neg().exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_two_levels_are_a_pair_with_a_text_at_the_threshold() -> None:
    latent = torch.linspace(-20, 20, 41).requires_grad_()
    threshold = torch.full((41, 1), 0.75)
    high = cumulative_logit(latent, torch.ones(41, dtype=torch.int64), threshold)
    torch.testing.assert_close(high, bradley_terry(latent - 0.75), atol=1e-6, rtol=0)
    low = cumulative_logit(latent, torch.zeros(41, dtype=torch.int64), threshold)
    torch.testing.assert_close(low, bradley_terry(0.75 - latent), atol=1e-6, rtol=0)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_gradients_of_ratings_are_finite(level: int) -> None:
    latent = tensor([-300.0, 0.0, 300.0]).requires_grad_()
    thresholds = tensor([-1.0, 1.0]).expand(3, 2).clone().requires_grad_()
    loss = cumulative_logit(latent, tensor(level).expand(3), thresholds).sum()
    slopes = torch.autograd.grad(loss, (latent, thresholds))
    assert all(bool(one.isfinite().all()) for one in slopes)


@pytest.mark.parametrize("margin", [-200.0, 0.0, 200.0])
def test_gradients_are_finite(margin: float) -> None:
    given = [tensor([margin]).requires_grad_(), tensor([-3.0]).requires_grad_()]
    for values in (
        margins_with_errors(*given),
        davidson(*given, tensor(True)),
        davidson(*given, tensor(False)),
        plackett_luce(given[0], tensor([0])),
    ):
        slopes: tuple[Tensor, ...] = torch.autograd.grad(values.sum(), given, allow_unused=True)
        assert all(one is None or bool(one.isfinite().all()) for one in slopes)
