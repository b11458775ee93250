"""Adaptation rules: each against another solver, a naive twin or numbers worked by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tiny import AGGREGATORS, WIDTH, make_batch, make_model, make_pairs
from torch import Tensor, nn, tensor
from torch.autograd.functional import hessian
from torch.nn.functional import softplus

import plrhf
from plrhf.core.components import build
from plrhf.core.second_order import second_derivatives
from plrhf.core.types import Feedback, UserBatch
from plrhf.data.features import FeatureSchema
from plrhf.encoders import (
    ClusterMixtureEncoder,
    HybridEncoder,
    LookupEncoder,
    NoneEncoder,
    UserEncoder,
)
from plrhf.models.adaptation import Adaptation, Basis, Gradient, Mixture, Posterior, Reweight
from plrhf.models.adaptation.base import AdaptedUsers, attenuated_margins, score_pairs
from plrhf.models.adaptation.fitting import (
    PairLosses,
    RowSpace,
    most_likely,
    user_tables,
)
from plrhf.models.adaptation.linear import LinearMargins, newton
from plrhf.models.adaptation.mixture import moments
from plrhf.models.adaptation.posterior import learned_prior, train_directions
from plrhf.models.adaptation.reweight import margins_by_particle
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel


def encoder_with(rows: Any) -> ClusterMixtureEncoder:
    """Clusters whose own rows, the generic user's first, are these."""
    table = tensor(rows)
    encoder = ClusterMixtureEncoder(
        n_users=len(table) - 1,
        user_dim=3,
        vocabulary=torch.zeros(7, 3),
        n_clusters=table.shape[1],
        init="normal",
    )
    with torch.no_grad():
        encoder.weights.weight.copy_(table)
    return encoder


def strong_model(kind: Any = PersonalRewardModel, aggregator: str = "film_last") -> Any:
    """A model whose pairs say something against the prior."""
    model = make_model(kind, aggregator=aggregator).eval()
    if kind is PersonalRewardModel:
        with torch.no_grad():
            model.head.weight *= 30
    return model


def with_clusters(model: Any, n_clusters: int = 4) -> Any:
    """The model with a cluster mixture in the place of its lookup."""
    torch.manual_seed(2)
    model.encoder = ClusterMixtureEncoder(
        n_users=5,
        user_dim=model.aggregator.user_dim,
        vocabulary=torch.zeros(7, 3),
        n_clusters=n_clusters,
        init="normal",
        weight_scale=1.0,
    )
    return model


def given(model: Any, owners: list[int]) -> Any:
    """One batch of pairs of these new users."""
    return make_batch(make_pairs(len(owners)), users=owners)


def test_the_prior_by_hand() -> None:
    # Departures from (1, 1): (2, 0), (0, 4), (-2, 0), so M = ((8, 0), (0, 16)) / 3.
    encoder = encoder_with([[1.0, 1.0], [3.0, 1.0], [1.0, 5.0], [-1.0, 1.0]])
    prior = learned_prior(encoder, scale=3.0)
    assert prior.origin.tolist() == [1.0, 1.0]
    moment = 9 * tensor([[8.0, 0.0], [0.0, 16.0]]) / 3
    torch.testing.assert_close(prior.factor.T @ prior.factor, moment)
    assert prior.points(torch.zeros(2, 2)).tolist() == [[1.0, 1.0]] * 2
    t = tensor([[0.5, -1.0]])
    torch.testing.assert_close(prior.points(t)[0], tensor([1.0, 1.0]) + t[0] @ prior.factor)


def test_new_users_are_combinations_of_few_train_users() -> None:
    prior = learned_prior(encoder_with([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [2.0, 4.0, 4.0]]))
    points = prior.points(torch.randn(5, 2))
    assert prior.factor.shape == (2, 3)
    torch.testing.assert_close(points[:, 1:], points[:, :1] * tensor([[2.0, 2.0]]))


class Biased(UserEncoder):
    """An outsider's: a number and a 2 x 3 table a user, and something shared."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.randn(3))
        self.bias = nn.Parameter(torch.randn(5))
        self.grid = nn.Parameter(torch.randn(5, 2, 3))

    def forward(self, users: UserBatch) -> Tensor:
        own = self.grid[users.user_id].sum(dim=1)
        return self.shared + own + self.bias[users.user_id, None]

    def generic(self, batch_size: int) -> Tensor:
        return (self.shared + self.grid[0].sum(dim=0) + self.bias[0]).expand(batch_size, -1)

    def user_parameters(self) -> list[nn.Parameter]:
        return [self.grid, self.bias]


def test_parameters_of_any_shape() -> None:
    encoder = Biased()
    space = RowSpace(encoder)
    assert set(user_tables(encoder)) == {"bias", "grid"} == set(space.shapes)
    rows = space.rows(space.train)
    assert {name: tuple(own.shape) for name, own in rows.items()} == {
        "bias": (4,),
        "grid": (4, 2, 3),
    }
    assert rows["bias"].equal(encoder.bias[1:]) and rows["grid"].equal(encoder.grid[1:])
    users = UserBatch(user_id=torch.arange(1, 5), features=torch.zeros(4, 0))
    assert space.vectors(space.train, users.features).equal(encoder(users))


@pytest.mark.parametrize("rule", [Posterior(), Basis(), Gradient(), Reweight()])
def test_no_parameters_of_single_users(rule: Adaptation) -> None:
    model = make_model(PersonalRewardModel)
    model.encoder = NoneEncoder()
    with pytest.raises(ValueError) as caught:
        rule.fit(model, [], n_users=1)
    assert str(caught.value) == (
        "encoder='NoneEncoder' is not allowed: expected one with parameters of single users. "
        "Adapt a model trained with encoder=lookup or encoder=cluster."
    )


def array(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy()


def design(model: Any, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Margins of a lookup with FiLM as constant [B] + e @ slope [B, user_dim]; beta_u cancels out."""
    pooled = array(model.pooled_trunk(batch))
    difference = (pooled[:, 0] - pooled[:, 1]) * array(model.head.weight)[0]  # [B, d]
    to_gamma = array(model.aggregator.to_film.weight)[:WIDTH]
    return difference.sum(axis=1), difference @ to_gamma


def solved(
    model: Any, batch: Any, basis: np.ndarray, precision: np.ndarray | float, centre: np.ndarray
) -> np.ndarray:
    """c of e = centre + c @ basis by another solver: logistic regression with a Gaussian prior."""
    constant, slope = design(model, batch)

    def objective(c: np.ndarray) -> float:
        margins = constant + slope @ (centre + c @ basis)
        return np.logaddexp(0, -margins).sum() + 0.5 * c @ (precision * np.eye(len(c))) @ c

    start = np.zeros(len(basis))
    return minimize(objective, start, method="Nelder-Mead", options={"xatol": 1e-6}).x


OWNERS = [0, 0, 1, 0, 1, 1, 0, 1, 3, 1, 0]  # new user 2 gives nothing


def own_batch(user: int) -> Any:
    pairs = [pair for pair, of in zip(make_pairs(11), OWNERS, strict=True) if of == user]
    return make_batch(pairs, users=[0] * len(pairs))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_posterior_is_the_most_likely_user(scale: float) -> None:
    model = strong_model()
    pairs = make_pairs(11)
    batches = [
        make_batch(pairs[:7], users=OWNERS[:7]),
        make_batch(pairs[7:], users=OWNERS[7:]),
    ]
    found = Posterior(prior_scale=scale).fit(model, batches, n_users=4)
    assert found.rows is not None and found.covariance is None
    rows = array(model.encoder.offsets.weight)[1:]
    whitened = np.linalg.cholesky(scale**2 * rows.T @ rows / len(rows)).T
    basis, start = array(model.encoder.basis), array(model.encoder.generic_vector)
    for user in (0, 1, 3):  # each alone, and by other means
        t = solved(model, own_batch(user), whitened @ basis, 1.0, start)
        # The sum of float32 losses, here 130 nats, is no finer than what these moves change in it.
        expected = t @ whitened
        np.testing.assert_allclose(found.rows["offsets.weight"][user], expected, atol=5e-3)
        np.testing.assert_allclose(found.vectors[user], start + expected @ basis, atol=5e-3)
        assert np.abs(expected).max() > 0.05
    assert found.vectors[2].equal(model.encoder.generic_vector)  # nothing is known of the third


def test_without_a_penalty_numbers_that_no_pair_tells_stay_zero() -> None:
    """The second user's pairs contradict each other, so that the first number has a minimum, log 3."""
    users = tensor([0, 1, 1, 1, 1])
    slopes = tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    pairs = LinearMargins.of_pairs(users, torch.zeros(5), slopes, n_users=2)
    found = newton(pairs, steps=50, penalty=0.0)
    assert found[:, 1].tolist() == [0.0, 0.0] and bool(found.isfinite().all())
    assert found[1, 0].item() == pytest.approx(math.log(3), abs=1e-6)


def test_newton_finds_what_lbfgs_finds() -> None:
    """With margins that are linear in t, mode, covariance and evidence are those of the general path."""
    model = strong_model()
    batches = [given(model, [0, 2, 2, 0, 0, 2]), make_batch(make_pairs(3, seed=4), users=[2, 2, 0])]
    prior = learned_prior(model.encoder, scale=3.0)
    linear, general = (PairLosses(model, batches, prior, n_users=3) for _ in range(2))
    assert linear.linear is not None
    general.linear = None
    expected = most_likely(general, steps=40, penalty=0.5)
    found = most_likely(linear, steps=40, penalty=0.5)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-2)
    assert found[0].abs().max() > 0.05 and found[1].abs().max() == 0
    for one, other in (
        (linear.by_user(found), general.by_user(found)),
        (linear.hessian(found), general.hessian(found)),
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "aggregator", "clusters"),
    [
        (PersonalRewardModel, "film_last", True),
        (PersonalRewardModel, "soft_prompt", False),
        (PersonalDPOPolicy, "film_last", False),
    ],
)
def test_margins_that_are_not_linear_in_users(kind: Any, aggregator: str, clusters: bool) -> None:
    model = strong_model(kind, aggregator)
    if clusters:
        with_clusters(model)
    losses = PairLosses(model, [given(model, [0, 1])], learned_prior(model.encoder), n_users=2)
    assert losses.linear is None


@pytest.mark.parametrize("aggregator", ["film_every_block", "soft_prompt", "late_soft_prompt"])
@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
def test_the_hessian_is_the_change_of_the_gradient(kind: Any, aggregator: str) -> None:
    model = strong_model(kind, aggregator)
    batches = [given(model, [0, 2, 2, 0]), make_batch(make_pairs(3, seed=4), users=[2, 2, 0])]
    losses = PairLosses(model, batches, learned_prior(model.encoder, scale=3.0), n_users=3)
    torch.manual_seed(1)
    t = 0.3 * torch.randn_like(losses.start())
    found = losses.hessian(t)
    for place in range(t.shape[1]):
        step = torch.zeros_like(t)
        step[:, place] = 5e-3
        change = losses.gradient(t + step)[1] - losses.gradient(t - step)[1]
        atol = 5e-3 * found.abs().max().item()
        torch.testing.assert_close(found[:, place], change / 1e-2, atol=atol, rtol=0)


def test_fast_operations_are_not_differentiated_twice() -> None:
    model = strong_model(aggregator="soft_prompt")
    batch = given(model, [0, 2])
    user = torch.zeros(3, model.aggregator.user_dim, requires_grad=True)
    loss = score_pairs(model, batch, user)[1].sum()
    with pytest.raises(RuntimeError, match="second_derivatives"):
        torch.autograd.grad(loss, user, create_graph=True)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [0.5, 2.0, 1.0, 0.5]])
def test_a_weight_counts_where_new_users_are_fitted(weights: list[float]) -> None:
    model = strong_model()
    none, weight = torch.zeros(4, dtype=torch.bool), torch.tensor(weights)
    batch = given(model, [0, 1, 1, 0])
    batch.feedback = Feedback(is_tie=none, weight=weight, strength=torch.ones(4))
    losses = PairLosses(model, [batch], learned_prior(model.encoder), n_users=2)
    t = torch.randn(losses.start().shape)
    margins, _ = score_pairs(model, batch, losses.vectors(t))
    expected = torch.zeros(2).index_add(0, batch.user_id, weight * softplus(-margins))
    torch.testing.assert_close(losses.by_user(t).float(), expected, atol=1e-4, rtol=1e-4)


def test_the_basis_is_a_penalised_logistic_regression() -> None:
    model = strong_model()
    found = Basis(l2=0.7).fit(model, [given(model, OWNERS)], n_users=4)
    assert found.rows is None
    start = array(model.encoder.generic_vector)
    orthonormal = np.linalg.qr(array(model.encoder.basis).T)[0].T  # spans what the rows reach
    for user in (0, 1, 3):
        c = solved(model, own_batch(user), orthonormal, 0.7, start)
        np.testing.assert_allclose(found.vectors[user], start + c @ orthonormal, atol=5e-3)
        assert np.abs(c).max() > 0.05


@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_the_fit_in_a_table_really_enlarged(kind: Any, aggregator: str) -> None:
    """At the optimum the gradient through the model's own forward vanishes, and nothing else moved."""
    model = make_model(kind, aggregator=aggregator).eval()
    before = copy.deepcopy(model.state_dict())
    prior = learned_prior(model.encoder, scale=2.0)
    batch = given(model, [0] * 5)
    found = Posterior(steps=30, prior_scale=2.0).fit(model, [batch], n_users=1)
    assert found.rows is not None
    row = found.rows["offsets.weight"][0]
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())

    encoder: LookupEncoder = model.encoder
    table = torch.cat([encoder.offsets.weight, row[None]]).detach()
    encoder.offsets = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=0)
    batch.user_id = torch.full((5,), len(table) - 1)
    user, _ = model.user_vectors(batch, ("user",))
    torch.testing.assert_close(user[0], found.vectors[0])
    margins, extra = model.margins_for(batch, user)
    likelihood = model.pair_loss(margins, extra, batch, user).sum()
    precision = torch.linalg.inv(prior.factor.T @ prior.factor)
    penalty = 0.5 * encoder.offsets.weight[-1] @ precision @ encoder.offsets.weight[-1]
    (gradient,) = torch.autograd.grad(likelihood + penalty, encoder.offsets.weight)
    pull = precision @ row  # of the prior; that of the pairs must be its opposite
    assert gradient[-1].abs().max() < 0.04 * pull.abs().max()  # float32 losses are no finer
    assert gradient[:-1].abs().max() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "aggregator", "clusters"),
    [
        (PersonalRewardModel, "film_last", False),
        (PersonalRewardModel, "soft_prompt", False),
        (PersonalDPOPolicy, "film_every_block", True),
    ],
)
def test_the_laplace_covariance_against_autograd(
    kind: Any, aggregator: str, clusters: bool
) -> None:
    """Each user's block is the inverse Hessian of -log p(t | pairs) that torch finds on its own."""
    model = strong_model(kind, aggregator)
    if clusters:
        with_clusters(model)
    batches = [given(model, [0, 2, 2, 0]), make_batch(make_pairs(3, seed=4), users=[2, 2, 0])]
    found = Posterior(steps=15, prior_scale=3.0, laplace=True).fit(model, batches, n_users=3)
    assert found.covariance is not None and found.directions is not None
    prior = learned_prior(model.encoder, scale=3.0)
    losses = PairLosses(model, batches, prior, n_users=3)
    t = most_likely(losses, steps=15)

    def of_all(flat: Tensor) -> Tensor:
        users = losses.vectors(flat.view_as(t))
        pairs = [score_pairs(model, batch, users)[1].sum() for batch in batches]
        return torch.stack(pairs).sum() + 0.5 * flat.square().sum()

    with second_derivatives():
        whole = hessian(of_all, t.flatten())
    expected = torch.linalg.inv(whole.double()).view(*t.shape, *t.shape)
    for user in range(3):
        torch.testing.assert_close(
            found.covariance[user].double(), expected[user, :, user], atol=2e-4, rtol=2e-3
        )
    torch.testing.assert_close(found.covariance[1], torch.eye(t.shape[1]))  # who gave nothing
    assert (found.covariance[0] - torch.eye(t.shape[1])).abs().max() > 1e-3
    step = 1e-2 * torch.eye(t.shape[1])[1].expand_as(t)
    moved = (losses.vectors(t + step) - losses.vectors(t - step)) / 2e-2
    torch.testing.assert_close(found.directions[:, 1], moved.detach(), atol=2e-3, rtol=2e-2)


def test_the_mixture_against_a_grid() -> None:
    """Shares, mean and covariance are those of the posterior on a fine grid, up to Laplace's error."""
    model = strong_model()
    n_pairs = 9
    batch = make_batch(make_pairs(n_pairs, seed=3), users=[0] * 5 + [2] * (n_pairs - 5))
    rule = Mixture(scale=2.0, strangers=0.3, stranger_scale=5.0, caution=0.0)
    found = rule.fit(model, [batch], n_users=3)
    assert found.shares is not None and found.covariance is not None
    assert found.resolved is not None
    assert found.resolved[1] == pytest.approx(0, abs=1e-6) and 0 < found.resolved[0] < 1
    space, sizes, directions = train_directions(model.encoder)
    assert len(sizes) == 2 and sizes[0] > sizes[1]
    axis = torch.linspace(-14, 14, 113, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)  # of the user's numbers, in units of the larger size
    points = space.generic + grid.float() @ (sizes[0] * directions)
    vectors = space.vectors(points, torch.zeros(len(grid), 0)).detach()
    constant, slope = design(model, batch)  # margins are linear in vectors
    fit = torch.nn.functional.logsigmoid(torch.from_numpy(constant + array(vectors) @ slope.T))
    share = float(sizes[1] / sizes[0])
    deviations = ((2.0, 2.0 * share), (0.0, 5.0 * math.sqrt(1 - share**2)))
    priors = []
    for both in deviations:
        # A deviation of 0 is a mass on the grid's zero, as of strangers in the first direction.
        one = [(-(axis**2) / (2 * s**2)).exp() if s > 0 else (axis == 0).double() for s in both]
        product = torch.cartesian_prod(*one).prod(dim=1)
        priors.append(product / product.sum())
    for user in (0, 1, 2):
        fits = fit[:, batch.user_id == user].sum(dim=1).exp()
        density = torch.stack([0.7 * priors[0] * fits, 0.3 * priors[1] * fits])
        density /= density.sum()
        torch.testing.assert_close(found.shares[user], density.sum(dim=1), atol=0.04, rtol=0)
        mean = density.sum(dim=0) @ grid
        expected = space.vectors(
            (space.generic + mean.float() @ (sizes[0] * directions))[None], torch.zeros(1, 0)
        )[0]
        away = (found.vectors[user] - expected).norm() / (1 + expected.norm())
        assert away < 0.12
        second = torch.einsum("g,gi,gj->ij", density.sum(dim=0), grid, grid) - mean.outer(mean)
        assert (found.covariance[user] - second).norm() < 0.25 * second.norm()
    assert found.shares[1].tolist() == pytest.approx([0.7, 0.3])  # who gave no pairs


def test_strangers_where_train_users_differ_equally_are_the_generic_user() -> None:
    model = strong_model()
    with torch.no_grad():
        angles = torch.arange(5) * (2 * math.pi / 5)
        model.encoder.offsets.weight[1:] = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = Mixture(scale=1.0, caution=0.0).fit(model, [given(model, [0, 0, 0])], n_users=1)
    alone = Posterior(laplace=True).fit(model, [given(model, [0, 0, 0])], n_users=1)
    assert found.shares is not None
    generic = model.encoder.generic(1)[0]
    expected = generic + found.shares[0, 0] * (alone.vectors[0] - generic)
    torch.testing.assert_close(found.vectors[0], expected.float(), atol=1e-4, rtol=1e-4)


def test_caution_draws_towards_the_generic_user_and_fades() -> None:
    """After 4 pairs it is half of what it is at first; with 0, the mean moves by what is left of it."""
    model = strong_model()
    batch = given(model, [0, 0, 0, 0, 1])
    plain, cautious = (
        Mixture(caution=caution).fit(model, [batch], n_users=3) for caution in (0.0, 0.4)
    )
    assert plain.shares is not None and cautious.shares is not None
    torch.testing.assert_close(plain.shares, cautious.shares)
    assert plain.covariance is not None and cautious.covariance is not None
    generic = model.encoder.generic(1)[0]
    for user, share in enumerate((0.4 / 2, 0.4 / (1 + 1 / 16), 0.4)):
        away = plain.vectors[user] - generic
        torch.testing.assert_close(
            cautious.vectors[user] - generic, (1 - share) * away, atol=1e-5, rtol=1e-4
        )
    torch.testing.assert_close(cautious.covariance[2], 0.6 * plain.covariance[2])  # mean 0


def test_moments_by_hand() -> None:
    """Halves of N(0, 1) and N(2, 3): mean 1, variance 2 + 1."""
    shares, means = torch.full((2, 1), 0.5), tensor([[[0.0]], [[2.0]]])
    mean, variance = moments(shares, means, tensor([[[[1.0]]], [[[3.0]]]]))
    assert (mean.item(), variance.item()) == (1.0, 3.0)


def test_attenuated_margins_against_numerical_integration() -> None:
    """sigma(m / sqrt(1 + pi v / 8)) is E sigma under the Gaussian of the user, to 0.02."""
    model = make_model(PersonalRewardModel, aggregator="film_last").eval()
    asked = make_batch(make_pairs(9, seed=7), users=[0, 1, 1, 0, 1, 0, 0, 1, 1])
    constant, slope = design(model, asked)
    spread = np.random.default_rng(0).normal(size=(2, 3, 32))
    spread *= 2 / np.abs(slope @ spread[0].T).max()  # deviations of margins are of this size
    directions, root = torch.randn(2, 3, 3), torch.from_numpy(spread).float()
    users = AdaptedUsers(
        vectors=torch.randn(2, 32),
        covariance=directions.mT @ directions,
        directions=torch.linalg.solve(directions, root),
    )
    margins = attenuated_margins(model, asked, users)
    plain = score_pairs(model, asked, users.vectors)[0]
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    away = []
    for at, user in enumerate(asked.user_id.tolist()):
        mean = constant[at] + slope[at] @ array(users.vectors[user])
        deviation = np.linalg.norm(spread[user] @ slope[at])
        values = 1 / (1 + np.exp(-(mean + deviation * points)))
        expected = (weights * values).sum() / weights.sum()
        away.append(abs(expected - plain[at].sigmoid().item()))
        assert margins[at].sigmoid().item() == pytest.approx(expected, abs=0.02)
    assert max(away) > 0.05  # it made a difference
    assert margins.sign().equal(plain.sign())


def test_gradient_steps_by_hand() -> None:
    """One step of plain descent on the mean loss of a user's pairs, and Adam's first step."""
    model = strong_model()
    constant, slope = design(model, own_batch(1))
    basis, start = array(model.encoder.basis), array(model.encoder.generic_vector)
    margins = constant + slope @ start
    gradient = -((1 / (1 + np.exp(margins)))[:, None] * (slope @ basis.T)).mean(axis=0)
    batch = given(model, OWNERS)
    for optimiser, expected in (("sgd", -0.2 * gradient), ("adam", -0.2 * np.sign(gradient))):
        rule = Gradient(steps=1, lr=0.2, optimiser=optimiser)  # type: ignore[arg-type]
        found = rule.fit(model, [batch], n_users=4)
        assert found.rows is not None
        np.testing.assert_allclose(found.rows["offsets.weight"][1], expected, atol=1e-4)
        assert found.vectors[2].equal(model.encoder.generic_vector)


def test_where_gradient_steps_start() -> None:
    model, batch = with_clusters(strong_model()), None
    batch = given(model, OWNERS)
    table = model.encoder.weights.weight.detach()

    def first(start: Any, seed: int = 0) -> Tensor:
        rule = Gradient(steps=1, lr=1e-9, start=start, seed=seed)
        rows = rule.fit(model, [batch], n_users=4).rows
        assert rows is not None
        return rows["weights.weight"][[0, 1, 3]]

    torch.testing.assert_close(first("generic"), table[0].expand(3, -1))
    torch.testing.assert_close(first("mean"), table[1:].mean(dim=0).expand(3, -1))
    assert first("random").equal(first("random")) and not first("random", 1).equal(first("random"))
    assert 0.4 < first("random").std() < 1.6


def weights_by_hand(model: Any, batch: Any, particles: Tensor, tau: float) -> Tensor:
    """The discrete posterior of one user, a particle and a pair at a time."""
    fit = []
    for particle in particles:
        margins, _ = score_pairs(model, batch, particle[None])
        fit.append(sum(math.log(1 / (1 + math.exp(-m))) for m in margins.tolist()) / tau)
    largest = max(fit)
    return tensor([math.exp(one - largest) for one in fit])


@pytest.mark.parametrize("aggregator", ["film_last", "soft_prompt"])
@pytest.mark.parametrize("of", ["users", "clusters"])
def test_reweighting_by_hand(aggregator: str, of: Any) -> None:
    model = with_clusters(strong_model(aggregator=aggregator), n_clusters=3)
    ids = UserBatch(user_id=torch.arange(1, 6), features=torch.zeros(5, 0))
    particles = (model.encoder(ids) if of == "users" else model.encoder.clusters).detach()
    rule = Reweight(of=of, temperature=2.0)
    found = rule.fit(model, [given(model, OWNERS)], n_users=4)
    assert found.rows is None
    for user in (0, 1, 3):
        with torch.no_grad():
            weights = weights_by_hand(model, own_batch(user), particles, 2.0)
        expected = weights @ particles / weights.sum()
        torch.testing.assert_close(found.vectors[user], expected, atol=1e-4, rtol=1e-3)
        assert weights.max() / weights.sum() > 1.1 / len(particles)
    torch.testing.assert_close(found.vectors[2], particles.mean(dim=0))  # the prior's


def test_settings_of_reweighting() -> None:
    model = with_clusters(strong_model(), n_clusters=3)
    batch, clusters = given(model, [0] * 7), model.encoder.clusters.detach()
    with torch.no_grad():
        weights = weights_by_hand(model, batch, clusters, 1.0)
        mean = weights_by_hand(model, batch, clusters, 7.0)
    best = Reweight(of="clusters", map_only=True).fit(model, [batch], n_users=1)
    assert best.vectors[0].equal(clusters[weights.argmax()])
    of_mean = Reweight(of="clusters", per_pair="mean").fit(model, [batch], n_users=1)
    torch.testing.assert_close(of_mean.vectors[0], mean @ clusters / mean.sum())
    sized = Reweight(of="clusters", prior="size").fit(model, [batch], n_users=1)
    shares = model.encoder.mixture(torch.arange(1, 6)).mean(dim=0).detach()
    weights = weights * shares
    torch.testing.assert_close(sized.vectors[0], weights @ clusters / weights.sum())
    with pytest.raises(ValueError, match=r"^eval\.adaptation\.prior='size' is not allowed: expec"):
        Reweight(prior="size")
    with pytest.raises(ValueError, match=r"^eval\.adaptation\.of='clusters' .* no clusters"):
        Reweight(of="clusters").fit(strong_model(), [batch], n_users=1)


def test_one_product_scores_all_particles_where_margins_are_linear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, particles = strong_model(), torch.randn(7, 32)
    batch = model.without_user(given(model, [3] * 5))
    with torch.no_grad():
        naive = torch.stack([score_pairs(model, batch, one.expand(4, -1))[0] for one in particles])
        calls: list[int] = []
        forward = type(model).margins_for

        def counted(self: Any, batch: Any, user: Tensor) -> Any:
            calls.append(len(user) // len(batch))
            return forward(self, batch, user)

        monkeypatch.setattr(type(model), "margins_for", counted)
        found = margins_by_particle(model, batch, particles)
        assert calls == [1, 3]  # the product, and three particles to check it on
        torch.testing.assert_close(found, naive, atol=1e-3, rtol=1e-4)

        def bent(self: Any, batch: Any, user: Tensor) -> Any:
            margins, extra = forward(self, batch, user)
            return margins + 0.3 * user.norm(dim=1).view_as(margins), extra

        monkeypatch.setattr(type(model), "margins_for", bent)
        naive = torch.stack([score_pairs(model, batch, one.expand(4, -1))[0] for one in particles])
        torch.testing.assert_close(margins_by_particle(model, batch, particles), naive)


def test_scores_are_those_of_the_model() -> None:
    model = make_model(PersonalRewardModel, aggregator="soft_prompt").eval()
    batch = make_batch(make_pairs(), users=[1, 2, 3, 0, 5, 1, 2])
    everybody = UserBatch(user_id=torch.arange(6), features=torch.zeros(6, 0))
    with torch.no_grad():
        margins, _ = score_pairs(model, batch, model.encoder(everybody))
    torch.testing.assert_close(margins, model.context_margins(batch)["user"])


@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
def test_the_trunk_runs_once_where_it_does_not_depend_on_the_user(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind, aggregator="film_last").eval()
    batches = [make_batch(make_pairs(n), users=[0] * n) for n in (5, 3)]
    with torch.no_grad():
        for batch in batches:
            if kind is PersonalDPOPolicy:
                batch.ref_logps = model.reference_logps(batch)
    rule = Posterior(steps=10, prior_scale=2.0)
    monkeypatch.setattr("plrhf.models.adaptation.base.KEPT_NUMBERS", 0)
    naive = rule.fit(model, batches, n_users=1).vectors
    monkeypatch.undo()
    runs: list[int] = []
    model.backbone.trunk.register_forward_hook(lambda *_: runs.append(1))
    found = rule.fit(model, batches, n_users=1).vectors
    assert len(runs) <= len(batches)
    torch.testing.assert_close(found, naive)
    assert (naive[0] - model.encoder.generic_vector).abs().max() > 1e-4


def test_sparse_tables_are_adapted_as_dense_ones() -> None:
    found = []
    for sparse in (False, True):
        model = make_model(PersonalRewardModel, aggregator="film_last").eval()
        model.encoder.offsets.sparse = sparse
        batch = given(model, [0] * 5)
        found.append(Posterior(steps=10, laplace=True).fit(model, [batch], n_users=1))
        assert model.encoder.offsets.sparse is sparse
    assert found[0].vectors.equal(found[1].vectors)


class Shifted(Adaptation):
    """An outsider's: adds a number to the generic vector of whoever gave pairs."""

    def __init__(self, *, step: float = 1.0) -> None:
        self.step = step

    def fit(
        self, model: Any, batches: Any, *, n_users: int, features: Tensor | None = None
    ) -> AdaptedUsers:
        vectors = model.encoder.generic(n_users).detach().clone()
        for batch in batches:
            vectors[batch.user_id] += self.step
        return AdaptedUsers(vectors=vectors)


def test_a_rule_from_outside_needs_no_tables(reward_run: Path) -> None:
    rule = build({"_target_": f"{__name__}.Shifted", "step": 2.0}, "eval.adaptation")
    model = plrhf.load(reward_run)
    pair = {"prompt": "Write a note.", "chosen": "Back at six.", "rejected": "I shall return."}
    user = plrhf.adapt(model, [pair], rule)
    torch.testing.assert_close(user.vector, model.encoder.generic(1)[0].detach() + 2.0)
    assert user.rows is None and user.n_pairs == 1


def test_a_new_user_without_pairs_is_known_by_features(reward_run: Path) -> None:
    model = plrhf.load(reward_run)
    schema = FeatureSchema(moments={"age": (30.0, 10.0)}, codes={})
    model.card = dataclasses.replace(model.card, features=schema.to_dict())
    model.encoder = HybridEncoder(
        n_users=5,
        user_dim=model.aggregator.user_dim,
        n_numbers=1,
        category_sizes=(),
        vocabulary=torch.zeros(1, 1),
        init="normal",
    ).eval()
    by_hand = UserBatch(user_id=tensor([0]), features=tensor([[2.0]]))
    user = model.adapt([], user_features={"age": 50})
    torch.testing.assert_close(user.vector, model.encoder.known(by_hand)[0].detach())
    assert not user.vector.allclose(model.adapt([]).vector, atol=1e-2)
    with pytest.raises(ValueError, match="^user_features='size' is not allowed: expected one of"):
        model.adapt([], user_features={"size": 2})


def test_pairs_too_long_are_counted_and_never_all_there_is(policy_run: Path) -> None:
    model = plrhf.load(policy_run)
    short = {"prompt": "Write a note.", "chosen": "Back at six.", "rejected": "I shall return."}
    long = {**short, "chosen": "sea " * 2000}
    user = model.adapt([short, long, short], Posterior(steps=3))
    assert (user.n_pairs, user.n_too_long) == (2, 1)
    assert model.adapt([]).n_pairs == 0
    with pytest.raises(ValueError) as caught:
        model.adapt([long, long])
    assert str(caught.value) == (
        "pairs='2 too long' is not allowed: expected prompt and response of at most "
        f"{model.card.text['max_tokens']} tokens. Give shorter pairs, or train with a larger "
        "data.max_tokens."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"steps": 0},
            "eval.adaptation.steps=0 is not allowed: expected a whole number from 1. "
            "Set eval.adaptation.steps=40.",
        ),
        (
            {"prior_scale": 0.0},
            "eval.adaptation.prior_scale=0.0 is not allowed: expected a number above 0. "
            "Set eval.adaptation.prior_scale=1.0.",
        ),
    ],
)
def test_bad_settings(settings: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Posterior(**settings)
    assert str(caught.value) == message
