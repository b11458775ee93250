"""Encoders that read a user's pairs: oddness, the regression inside, the variational posterior."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn, tensor
from torch.distributions import Normal, kl_divergence

from plrhf.core.types import UserBatch, UserContext
from plrhf.encoders import ContextEncoder, OddEncoder, PairReader
from plrhf.encoders.context import kl_from_standard_normal, swap_guide
from plrhf.encoders.odd import most_likely

N_USERS, USER_DIM, HIDDEN = 4, 6, 5
PRESENT = [[True, True, True], [True, False, True], [False, False, False], [False, True, False]]


def context() -> UserContext:
    """3, 2, 0 and 1 pairs of four users, on 11 texts."""
    texts = torch.stack([torch.randperm(11)[:2] for _ in range(12)]).view(4, 3, 2)
    return UserContext(hidden=torch.randn(11, HIDDEN), texts=texts, present=tensor(PRESENT))


def users(given: UserContext | None, ids: Any = (1, 2, 0, 4)) -> UserBatch:
    return UserBatch(user_id=tensor(ids), features=torch.zeros(len(ids), 0), context=given)


def build(kind: type[PairReader], **settings: Any) -> Any:
    """An encoder all of whose weights are somewhere."""
    own = {"n_users": N_USERS, "user_dim": USER_DIM, "hidden_size": HIDDEN, "width": 7}
    encoder = kind(**own, vocabulary=torch.zeros(9, USER_DIM), **settings)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.7)
    return encoder.eval()


READERS: list[tuple[type[PairReader], dict[str, Any]]] = [
    (OddEncoder, {"rank": 3}),
    (OddEncoder, {"rank": 2, "consensus": True}),
    (ContextEncoder, {}),
    (ContextEncoder, {"reads": "response", "guide_weight": 0.5}),
]


@pytest.mark.parametrize("seed", range(5))
def test_swapping_every_choice_turns_the_offset_round_exactly(seed: int) -> None:
    torch.manual_seed(seed)
    encoder, given = build(OddEncoder, rank=1 + seed), context()
    offsets = encoder.offsets(given)
    assert torch.equal(encoder.offsets(given.swapped), -offsets)
    assert (offsets[[0, 1, 3]] != 0).all() and (offsets[2] == 0).all()
    torch.testing.assert_close(encoder(users(given)), encoder.generic(4) + offsets)


def test_a_consensus_makes_choices_against_it_count_more() -> None:
    encoder, given = build(OddEncoder, rank=3, consensus=True), context()
    own, opposite = encoder.offsets(given)[0], encoder.offsets(given.swapped)[0]
    assert not torch.allclose(own, -opposite)
    with torch.no_grad():
        encoder.agreed.weight.zero_()
    assert torch.equal(encoder.offsets(given), -encoder.offsets(given.swapped))


def test_offsets_are_sums_over_pairs_with_even_weights() -> None:
    """o_u lies in the span of the differences, in whatever order pairs stand."""
    encoder, given = build(OddEncoder, rank=3, steps=2), context()
    offsets = encoder.offsets(given)
    order = tensor([2, 0, 1])
    shuffled = UserContext(given.hidden, given.texts[:, order], given.present[:, order])
    torch.testing.assert_close(encoder.offsets(shuffled), offsets)
    phi = encoder.traits(encoder.layer(given.hidden))
    only = given.texts[3, 1]  # the one pair of the last user
    difference = (phi[only[0]] - phi[only[1]]) @ encoder.directions
    ratio = offsets[3] / difference
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)
    assert ratio[0] > 0


def test_one_step_by_hand() -> None:
    # x = 2, w = 1: curvature 1 + 4 / 4 = 2, gradient 2 sigma(0) = 1, so z = 1/2.
    # The second step: gradient 2 sigma(-1) - 1/2 = 0.0378828..., so z = 1/2 + 0.0189414...
    x, weight = tensor([[[2.0]]]), tensor([[1.0]])
    once, twice = (most_likely(x, weight, 0 * weight, steps=n).item() for n in (1, 2))
    assert once == pytest.approx(0.5)
    assert twice == pytest.approx(0.5 + (2 / (1 + np.e) - 0.5) / 2)


def test_many_steps_find_the_most_likely_person() -> None:
    x, weight, shared = torch.randn(3, 5, 2) * 2, torch.rand(3, 5), torch.randn(3, 5)
    weight[1, 2:] = 0
    found = most_likely(x, weight, shared, steps=400)
    for user in range(3):

        def objective(z: Any, u: int = user) -> float:
            margins = shared[u].double().numpy() + x[u].double().numpy() @ z
            likely = weight[u].double().numpy() * np.logaddexp(0, -margins)
            return float(likely.sum() + 0.5 * z @ z)

        expected = minimize(objective, np.zeros(2), tol=1e-10).x
        np.testing.assert_allclose(found[user].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("kind", "settings"), READERS)
def test_who_has_no_pair_is_the_generic_user(kind: type[PairReader], settings: Any) -> None:
    encoder, given = build(kind, **settings), context()
    found = encoder(users(given))
    assert torch.equal(found[2], encoder.generic(1)[0])
    assert all(not torch.allclose(found[at], found[2]) for at in (0, 1, 3))
    nothing = UserContext(given.hidden, given.texts[:, :0], given.present[:, :0])
    assert torch.equal(encoder(users(nothing)), encoder.generic(4))
    assert list(encoder.user_parameters()) == [] and encoder.reads_context


@pytest.mark.parametrize(("kind", "settings"), READERS)
def test_places_without_a_pair_change_nothing(kind: type[PairReader], settings: Any) -> None:
    encoder, given = build(kind, **settings), context()
    before = encoder(users(given))
    given.texts = torch.where(given.present[..., None], given.texts, 3)
    torch.testing.assert_close(encoder(users(given)), before)
    encoder.train()(users(given)).square().sum().backward()
    gradients = [one.grad for one in encoder.parameters()]
    assert all(one is not None and one.isfinite().all() for one in gradients)


@pytest.mark.parametrize(("kind", "settings"), READERS)
def test_stored_vectors_serve_where_no_pairs_are_given(
    kind: type[PairReader], settings: Any
) -> None:
    encoder, given = build(kind, **settings), context()
    expected = encoder(users(given))
    encoder.store(users(given))
    assert torch.equal(encoder(users(None, (4, 0, 1))), expected[[3, 2, 0]])
    with pytest.raises(
        ValueError, match="^context=None is not allowed: expected pairs of the users"
    ):
        encoder(users(None, (3,)))


@pytest.mark.parametrize("reads", ["pair", "response"])
def test_the_posterior_is_that_of_a_plain_network_on_each_user_alone(reads: str) -> None:
    encoder, given = build(ContextEncoder, reads=reads), context()
    mean, log_variance = encoder.posterior(given)
    weights = [side.weight for side in encoder.sides]
    bias = sum(side.bias for side in encoder.sides)
    for user in (0, 1, 3):
        pairs = given.texts[user][given.present[user]]
        chosen, rejected = (given.hidden[pairs[:, side]] for side in (0, 1))
        if reads == "pair":  # one linear map of both responses end to end
            entry = torch.cat([chosen, rejected], 1) @ torch.cat(weights, 1).T + bias
            read = encoder.layers(entry)
        else:
            each = [encoder.layers(one @ weights[0].T + bias) for one in (chosen, rejected)]
            read = torch.cat(each, 1)
        query, key, value = (
            one(read)[None] for one in (encoder.queries, encoder.keys, encoder.values)
        )
        related = nn.functional.scaled_dot_product_attention(query, key, value)[0].mean(dim=0)
        torch.testing.assert_close(mean[user], encoder.mean(related).clamp(-1, 1))
        torch.testing.assert_close(log_variance[user], encoder.log_variance(related).clamp(-1, 1))


@pytest.mark.slow
def test_draws_in_training_are_of_the_posterior() -> None:
    encoder, given = build(ContextEncoder, kl_weight=0.5), context()
    mean, log_variance = encoder.posterior(given)
    vectors, penalty = encoder.encode(users(given))
    assert torch.equal(vectors[[0, 1, 3]], mean[[0, 1, 3]]) and penalty is None
    encoder.train()
    draws = torch.stack([encoder.encode(users(given))[0] for _ in range(4000)])[:, [0, 1, 3]]
    mean, deviation = mean[[0, 1, 3]], (0.5 * log_variance[[0, 1, 3]]).exp()
    assert (draws.mean(0) - mean).abs().max() < 0.15
    assert (draws.std(0) / deviation - 1).abs().max() < 0.1
    assert (encoder.encode(users(given))[1][2] == 0).all()  # nothing is inferred of nobody


def test_penalties_against_torch_and_by_hand() -> None:
    mean, log_variance = torch.randn(3, 4), torch.randn(3, 4)
    normal = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(normal, Normal(torch.zeros(4), torch.ones(4))).sum(dim=1)
    torch.testing.assert_close(kl_from_standard_normal(mean, log_variance), expected)
    own = (tensor([[3.0, 4.0]] * 3), tensor([[0.0, 2.0]] * 3))
    opposite = (
        tensor([[-6.0, -8.0], [3.0, 4.0], [4.0, -3.0]]),
        tensor([[0.0, 1.0], [0.0, 5.0], [0.0, -1.0]]),
    )
    # Opposite means and equal spreads: 0. Equal means: 1. At right angles, spreads opposite: .5 + .1.
    torch.testing.assert_close(swap_guide(own, opposite), tensor([0.0, 1.0, 0.6]))


def test_the_guide_does_not_push_the_opposite() -> None:
    encoder, given = build(ContextEncoder, kl_weight=0.0, guide_weight=2.0), context()
    encoder.train()
    penalty = encoder.encode(users(given))[1]
    own = encoder.posterior(given)
    opposite = tuple(one.detach() for one in encoder.posterior(given.swapped))
    expected = 2.0 * swap_guide(own, opposite) * given.present.any(dim=1)
    torch.testing.assert_close(penalty, expected)
    found: Tensor = torch.autograd.grad(penalty.sum(), encoder.mean.weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), encoder.mean.weight)[0])
