"""Learned shrinkage: the M-step and the divergence by hand, and variances of simulated users."""

from __future__ import annotations

from math import log

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn, tensor
from torch.distributions import Normal, kl_divergence

from plrhf.core.losses import bradley_terry
from plrhf.core.shrinkage import (
    Shrinkage,
    ShrunkLinear,
    divergence,
    hashed_normal,
    posterior_variance,
)


def test_posterior_variance_by_hand() -> None:
    found = posterior_variance(tensor(8.0), tensor([0.25, 0.0]), tensor([0.5, 3.0]))
    assert found.tolist() == pytest.approx([1 / (8 * 0.25 + 2), 3.0])


def test_divergence_is_that_of_torch() -> None:
    mean, variance, prior = torch.randn(5, 3), torch.rand(5, 3) + 0.1, tensor([0.3, 1.0, 7.0])
    twin = kl_divergence(Normal(mean, variance.sqrt()), Normal(0.0, prior.sqrt()))
    torch.testing.assert_close(divergence(mean, variance, prior), twin)


def test_the_best_prior_variance_is_the_m_step() -> None:
    """Rows 1 and 3 with posterior variances 0.5 and 1.5: mean of z^2 + v = (1 + 0.5 + 9 + 1.5) / 2 = 6."""
    mean, variance = tensor([1.0, 3.0]), tensor([0.5, 1.5])
    at_best = tensor(6.0, requires_grad=True)
    divergence(mean, variance, at_best).sum().backward()
    assert at_best.grad is not None and at_best.grad.item() == pytest.approx(0.0, abs=1e-6)
    for other in (5.0, 7.0):
        worse = divergence(mean, variance, tensor(other)).sum()
        assert worse > divergence(mean, variance, tensor(6.0)).sum()


def test_a_row_is_charged_once_over_its_pairs() -> None:
    shrinkage = Shrinkage(2)
    with torch.no_grad():
        shrinkage.log_prior.copy_(tensor([log(2.0), log(0.5)]))
        shrinkage.log_information.copy_(tensor([log(0.25), log(1.0)]))
    row, n_pairs = tensor([[1.0, -1.0]]), tensor([[3.0]])
    variances = [1 / (0.75 + 0.5), 1 / (3.0 + 2.0)]
    by_hand = sum(
        0.5 * (1 / prior + v / prior - 1 - log(v / prior))
        for v, prior in zip(variances, (2.0, 0.5), strict=True)
    )
    assert 3 * shrinkage(row, n_pairs).item() == pytest.approx(by_hand, rel=1e-6)


def test_gradients_of_the_penalty() -> None:
    shrinkage = Shrinkage(3, rows=4).double()
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    n_pairs = tensor([7.0], dtype=torch.float64)
    inputs = (rows, shrinkage.log_prior, shrinkage.log_information)
    assert torch.autograd.gradcheck(lambda *_: shrinkage(rows, n_pairs), inputs)
    gradient = torch.autograd.grad(shrinkage(rows, n_pairs).sum(), rows)[0]
    torch.testing.assert_close(gradient, rows.detach() / 7)  # z / (s^2 n) with s = 1


def test_draws_have_the_posterior_spread() -> None:
    torch.manual_seed(0)
    shrinkage = Shrinkage(2)
    with torch.no_grad():
        shrinkage.log_information.copy_(tensor([log(0.75), log(8.0)]))
    draws = shrinkage.sample(tensor([[1.0, -2.0]]).expand(20_000, 2), tensor([[4.0]]))
    assert draws.mean(0).tolist() == pytest.approx([1.0, -2.0], abs=0.02)
    assert draws.var(0).tolist() == pytest.approx([1 / 4, 1 / 33], rel=0.05)


def test_hashed_numbers_are_normal_and_independent() -> None:
    rows, columns = torch.arange(5_000)[:, None], torch.arange(3)
    drawn = hashed_normal(tensor(7), tensor(2), rows, columns)
    assert drawn.shape == (5_000, 3) and drawn.dtype == torch.float32
    assert kstest(drawn.flatten().numpy(), "norm").pvalue > 0.01
    later = hashed_normal(tensor(7), tensor(3), rows, columns)
    together = torch.cat([drawn, later, drawn.roll(1, dims=0)], dim=1)
    assert (together.T.corrcoef() - torch.eye(9)).abs().max() < 0.06  # 4 / sqrt(5000)


def test_processes_draw_their_share_of_the_same_noise() -> None:
    shrinkage = Shrinkage(3)
    rows, n_pairs = torch.randn(7, 3), torch.full((7, 1), 2.0)
    places = tensor([40, 3, 8, 1, 0, 77, 5])
    whole = shrinkage.sample(rows, n_pairs, places)
    for share in (slice(0, 4), slice(4, 7)):
        torch.testing.assert_close(
            shrinkage.sample(rows[share], n_pairs[share], places[share]), whole[share]
        )
    shrinkage.step.fill_(1)
    assert not shrinkage.sample(rows, n_pairs, places).equal(whole)


@pytest.mark.slow
def test_variances_of_simulated_users_are_found() -> None:
    """150 users with 21 pairs each differ in the first of two directions, by 1.5, and not in the other."""
    torch.manual_seed(0)
    n_users, n_pairs = 150, 21
    user = torch.arange(n_users).repeat_interleave(n_pairs)
    true = torch.randn(n_users) * 1.5
    pairs = torch.randn(len(user), 2)
    first_is_better = torch.rand(len(user)) < torch.sigmoid(true[user] * pairs[:, 0])
    pairs = torch.where(first_is_better[:, None], pairs, -pairs)
    numbers = nn.Parameter(0.1 * torch.randn(n_users, 2))
    shrinkage = Shrinkage(2)
    optimizer = torch.optim.Adam([numbers, *shrinkage.parameters()], lr=0.05)
    each = tensor([[float(n_pairs)]])
    for step in range(400):
        shrinkage.step.fill_(step)
        own = numbers[user]
        margins = (shrinkage.sample(own, each) * pairs).sum(1)
        loss = bradley_terry(margins).mean() + shrinkage(own, each).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = (0.5 * shrinkage.log_prior.detach()).exp()
    assert found[0].item() == pytest.approx(true.std().item(), rel=0.15)
    assert found[1] < 0.3
    assert numbers[:, 1].std() < 0.1 < numbers[:, 0].std()


def test_a_shrunk_map_is_drawn_in_training_alone() -> None:
    torch.manual_seed(0)
    layer = ShrunkLinear(3, 5)
    layer.n_pairs.fill_(11.0)
    values = torch.randn(2, 3)
    first = layer(values)
    layer.shrinkage.step.fill_(1)
    assert not layer(values).equal(first)
    assert isinstance(layer.penalty, Tensor) and layer.penalty.shape == ()
    layer.penalty.backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, layer.weight.detach() / 11)
    torch.testing.assert_close(layer.eval()(values), values @ layer.weight.T)
