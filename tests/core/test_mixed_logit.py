"""A mixed logit against a general optimiser, automatic differentiation and simulated people."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from plrhf.core.mixed_logit import MixedLogit, Pairs, fit_mixed_logit, without_own

N_USERS, D, K = 5, 4, 2


def choices(n: int, n_users: int, d: int) -> tuple[Tensor, Tensor]:
    """Features of choices, and who chose; user 2 has none."""
    user = torch.randint(n_users - 1, (n,))
    return torch.randn(n, d, dtype=torch.float64), user + (user >= 2).long()


def started() -> MixedLogit:
    variances = torch.tensor(0.7).double(), torch.tensor([2.0, 0.3]).double()
    zeros = (torch.zeros(size, dtype=torch.float64) for size in ((D,), (N_USERS, K)))
    return MixedLogit(*zeros, *variances)


def test_newtons_optimum_and_spread_are_those_of_general_methods() -> None:
    torch.manual_seed(0)
    x, user = choices(41, N_USERS, D)
    z = x[:, [3, 1]] * 2.0
    fit, pairs = started(), Pairs(x, z, user, N_USERS)
    for _ in range(12):
        of_shared, of_own = pairs.newton_step(fit)

    def objective(flat: Tensor) -> Tensor:
        own = flat[D:].view(N_USERS, K)
        moved = MixedLogit(flat[:D], own, fit.shared_variance, fit.own_variance)
        return -moved.objective(x, z, user)

    found = torch.cat([fit.shared, fit.own.flatten()])
    by_scipy = minimize(
        lambda flat: float(objective(torch.from_numpy(flat))), np.zeros(len(found)), tol=1e-10
    )
    np.testing.assert_allclose(found, by_scipy.x, atol=1e-4)
    assert fit.own[2].abs().max() < 1e-12 and fit.own[0].abs().max() > 0.1
    hessian = torch.autograd.functional.hessian(objective, found)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(torch.linalg.inv(hessian).diagonal()[:D], of_shared)
    of_users = torch.linalg.inv(hessian[D:, D:]).diagonal().view(N_USERS, K)
    torch.testing.assert_close(of_users, of_own)


@pytest.mark.parametrize("n", [0, 1, 3, 7])
def test_own_weights_are_integrated_out(n: int) -> None:
    """Of fewer and of more pairs than own weights, against the plain formulas."""
    torch.manual_seed(4)
    x, z = torch.randn(n, 5, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)
    variance = torch.tensor([2.0, 1e-9, 30.0], dtype=torch.float64)
    half, covariance = without_own(x, z, variance)
    plain = torch.linalg.inv(z.T @ z + (1 / variance).diag())
    torch.testing.assert_close(covariance, plain, rtol=1e-6, atol=1e-12)
    marginal = torch.linalg.inv(torch.eye(n).double() + z @ variance.diag() @ z.T)
    torch.testing.assert_close(half.T @ half, x.T @ marginal @ x)


def test_variances_of_simulated_people_are_found() -> None:
    """200 people of 30 pairs differ by 1.5, by 0.5 and not at all in three of the five directions."""
    torch.manual_seed(1)
    n_users, n_pairs = 200, 30
    user = torch.arange(n_users).repeat_interleave(n_pairs)
    x = torch.randn(len(user), 5, dtype=torch.float64)
    spread = torch.tensor([1.5, 0.5, 0.0])
    own = torch.randn(n_users, 3) * spread
    margins = x @ torch.tensor([1.0, 0.0, -0.5, 0.0, 0.0]).double() + (x[:, 2:] * own[user]).sum(1)
    x = torch.where(torch.rand(len(user)) < margins.sigmoid(), 1.0, -1.0)[:, None] * x
    fit = fit_mixed_logit(x, x[:, 2:], user, n_users=n_users)
    assert fit.own_variance[:2].sqrt().tolist() == pytest.approx([1.5, 0.5], rel=0.15)
    assert fit.own_variance[2] < 0.03
    assert fit.shared.tolist() == pytest.approx([1.0, 0.0, -0.5, 0.0, 0.0], abs=0.2)
    agreement = np.corrcoef(fit.own[:, 0], own[:, 0])[0, 1]
    assert agreement > 0.85


def test_a_step_never_leads_down() -> None:
    """From far away, where the whole Newton step would go too far."""
    torch.manual_seed(2)
    x, user = choices(60, N_USERS, D)
    z = x[:, :K]
    fit, pairs = started(), Pairs(x, z, user, N_USERS)
    fit.shared = 40.0 * torch.ones(D, dtype=torch.float64)
    fit.shared_variance = torch.tensor(1e6).double()
    before = fit.objective(x, z, user)
    for _ in range(8):
        pairs.newton_step(fit)
        after = fit.objective(x, z, user)
        assert after >= before
        before = after
