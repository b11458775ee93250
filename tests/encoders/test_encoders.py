"""User encoders: each row of the method's table by hand, who shares what, how vectors start."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor

from plrhf.core.types import UserBatch
from plrhf.encoders import (
    ClusterMixtureEncoder,
    FeatureMLPEncoder,
    HybridEncoder,
    LookupEncoder,
    NoneEncoder,
    UniformEncoder,
    UserEncoder,
)
from plrhf.encoders.base import initial_vectors

WIDTH = 3
TOKENS = torch.arange(97.0 * WIDTH).view(97, WIDTH)  # 97 token embeddings, all different


def users(*ids: int, features: Any = ()) -> UserBatch:
    rows = tensor(features) if len(features) > 0 else torch.zeros(len(ids), 0)
    return UserBatch(user_id=tensor(ids), features=rows)


def lookup(**settings: Any) -> LookupEncoder:
    return LookupEncoder(**{"n_users": 4, "user_dim": WIDTH, "vocabulary": TOKENS, **settings})


def cluster(**settings: Any) -> ClusterMixtureEncoder:
    own = {"n_users": 4, "user_dim": WIDTH, "vocabulary": TOKENS, "n_clusters": 2}
    return ClusterMixtureEncoder(**{**own, **settings})


def features(**settings: Any) -> FeatureMLPEncoder:
    """Two numbers and a category of 3 levels."""
    own = {"user_dim": WIDTH, "n_numbers": 2, "category_sizes": (3,), "vocabulary": TOKENS}
    return FeatureMLPEncoder(**{**own, "init": "normal", **settings})


def put(parameter: Any, values: Any) -> None:
    with torch.no_grad():
        parameter.copy_(tensor(values))


def test_none_has_no_vectors() -> None:
    encoder = NoneEncoder()
    assert encoder(users(1, 2, 0)).shape == (3, 0)
    assert encoder.generic(5).shape == (5, 0)
    assert not encoder.personal
    assert list(encoder.parameters()) == []


def test_uniform_is_one_vector_for_everybody() -> None:
    encoder = UniformEncoder(user_dim=WIDTH, vocabulary=TOKENS)
    put(encoder.generic_vector, [1.0, 2.0, 3.0])
    assert encoder(users(0, 2)).tolist() == [[1.0, 2.0, 3.0]] * 2
    assert encoder.generic(1).tolist() == [[1.0, 2.0, 3.0]]
    assert not encoder.personal


def test_lookup_by_hand() -> None:
    encoder = lookup()
    put(encoder.generic_vector, [1.0, 2.0, 3.0])
    put(
        encoder.offsets.weight,
        [[0.0] * 3, [10.0, 0.0, 0.0], [0.0, 20.0, 5.0], [1.0] * 3, [2.0] * 3],
    )
    assert encoder(users(2, 0, 1)).tolist() == [[1, 22, 8], [1, 2, 3], [11, 2, 3]]
    assert encoder.generic(2).tolist() == [[1, 2, 3]] * 2


def test_lookup_of_low_rank_by_hand() -> None:
    encoder = lookup(rank=2)
    put(encoder.generic_vector, [1.0, 2.0, 3.0])
    put(encoder.basis, [[1.0, 0.0, 1.0], [0.0, 10.0, 0.0]])
    put(encoder.offsets.weight, [[0.0, 0.0], [2.0, 3.0], [-1.0, 0.5], [0.0, 1.0], [1.0, 1.0]])
    # (1, 2, 3) + 2 * (1, 0, 1) + 3 * (0, 10, 0) = (3, 32, 5)
    assert encoder(users(1, 0, 2)).tolist() == [[3, 32, 5], [1, 2, 3], [0, 7, 2]]
    assert encoder.offsets.weight.shape == (5, 2)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_generic_user_keeps_no_offset(rank: int | None) -> None:
    encoder = lookup(rank=rank)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, weight_decay=0.5)
    start = encoder.generic(1).clone()
    for _ in range(3):
        optimizer.zero_grad()
        encoder(users(0, 1, 0, 3)).square().sum().backward()
        optimizer.step()
    assert encoder.offsets.weight[0].abs().max() == 0.0
    assert not encoder.generic(1).equal(start)
    assert encoder(users(0)).equal(encoder.generic(1))


def test_cluster_mixture_by_hand() -> None:
    encoder = cluster()
    put(encoder.clusters, [[4.0, 0.0, 8.0], [0.0, 4.0, 8.0]])
    weights = [[0.0, 0.0], [log(3), 0.0], [0.0, log(3)], [0.0, 0.0], [5.0, 5.0]]
    put(encoder.weights.weight, weights)
    # softmax(ln 3, 0) = (3/4, 1/4): 3/4 * (4, 0, 8) + 1/4 * (0, 4, 8) = (3, 1, 8)
    expected = tensor([[3.0, 1.0, 8.0], [1.0, 3.0, 8.0], [2.0, 2.0, 8.0], [2.0, 2.0, 8.0]])
    torch.testing.assert_close(encoder(users(1, 2, 0, 4)), expected)
    torch.testing.assert_close(encoder.generic(2), expected[2:])


def test_the_generic_user_of_clusters_learns_weights_of_its_own() -> None:
    encoder = cluster()
    encoder.generic(1)[0, 0].backward()
    gradient = encoder.weights.weight.grad
    assert gradient is not None
    assert (gradient[0] != 0).all() and (gradient[1:] == 0).all()


def linear_features(encoder: FeatureMLPEncoder) -> None:
    """Make the network the identity on sums, so that vectors can be worked out by hand."""
    linear = nn.Linear(2 * 2 + 2, WIDTH, bias=False)
    encoder.mlp = nn.Sequential(linear)
    # Inputs: number 1, number 2, missing 1, missing 2, category's two dimensions.
    put(
        linear.weight,
        [
            [1.0, 10.0, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 1.0, 10.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 1.0, 10.0],
        ],
    )
    put(encoder.generic_vector, [100.0, 200.0, 300.0])
    put(encoder.categories[0].weight, [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([2.0, 3.0, 0.0], [132.0, 200.0, 311.0]),  # everything known
        ([2.0, 3.0, 2.0], [132.0, 200.0, 333.0]),
        ([nan, 3.0, 1.0], [130.0, 201.0, 322.0]),  # a number missing: 0 and a mark
        ([0.0, 3.0, 1.0], [130.0, 200.0, 322.0]),  # which is not the number 0
        ([2.0, 3.0, nan], [132.0, 200.0, 300.0]),  # category missing or unseen: zero vector
        ([nan, nan, nan], [100.0, 200.0, 300.0]),  # nothing known: e_0, marks or not
    ],
)
def test_features_by_hand(given: list[float], expected: list[float]) -> None:
    encoder = features(category_dim=2)
    linear_features(encoder)
    someone = [1.0, 1.0, 1.0]  # beside whom the user stands in the batch
    assert encoder(users(0, 3, features=[someone, given]))[1].tolist() == expected


def test_nothing_known_is_exactly_the_generic_user() -> None:
    encoder = features()
    known, unknown = encoder(users(7, 8, features=[[1.0, nan, nan], [nan, nan, nan]]))
    assert unknown.equal(encoder.generic(1)[0])
    assert not known.equal(unknown)


@pytest.mark.parametrize(("n_numbers", "sizes"), [(2, ()), (0, (3, 5)), (1, (2,))])
@pytest.mark.parametrize("rank", [None, 2])
def test_features_of_every_kind(n_numbers: int, sizes: tuple[int, ...], rank: int | None) -> None:
    encoder = features(n_numbers=n_numbers, category_sizes=sizes, rank=rank, hidden=7)
    last_levels = [0.5] * n_numbers + [size - 1.0 for size in sizes]
    vectors = encoder(users(1, 2, features=[last_levels, [nan] * len(last_levels)]))
    assert vectors.shape == (2, WIDTH) and vectors.isfinite().all()
    vectors[0].sum().backward()
    for gradient in (table.weight.grad for table in encoder.categories):
        assert isinstance(gradient, Tensor) and gradient[-1].abs().max() > 0
    widths = [layer.out_features for layer in encoder.modules() if isinstance(layer, nn.Linear)]
    assert widths == ([7, 2, WIDTH] if rank == 2 else [7, WIDTH])


@pytest.mark.parametrize("make", [lookup, partial(lookup, rank=2), cluster])
def test_a_users_parameters_are_a_row_of_their_own(make: Callable[[], UserEncoder]) -> None:
    encoder = make()  # here, not in the list above: tests alone are seeded
    before = encoder(users(0, 1, 2, 3, 4)).detach()
    (table,) = encoder.user_parameters()
    assert table.shape[0] == 5
    with torch.no_grad():
        table[3] += torch.randn_like(table[3])  # adding a constant leaves a softmax as it is
    changed = (encoder(users(0, 1, 2, 3, 4)) - before).abs().amax(dim=1) > 0
    assert changed.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize(
    "make",
    [NoneEncoder, partial(UniformEncoder, user_dim=3, vocabulary=TOKENS), features],
    ids=["none", "uniform", "features"],
)
def test_others_have_no_parameters_of_single_users(make: Callable[[], UserEncoder]) -> None:
    assert list(make().user_parameters()) == []


def test_vectors_from_the_vocabulary_are_rows_drawn_with_replacement() -> None:
    vectors = initial_vectors(10_000, 2 * WIDTH, init="vocabulary", vocabulary=TOKENS)
    first = vectors.view(-1, WIDTH)[:, 0]
    tokens = (first / WIDTH).long()
    assert vectors.view(-1, WIDTH).equal(TOKENS[tokens])
    assert len(tokens.unique()) == 97
    assert lookup(n_users=10_000, offset_scale=1.0).offsets.weight.shape == (10_001, WIDTH)


def test_other_starts() -> None:
    def start(init: Any) -> Tensor:
        return initial_vectors(1000, 5, init=init, vocabulary=TOKENS)

    uniform, normal = start("uniform"), start("normal")
    assert (
        uniform.min() >= -0.5
        and uniform.max() < 0.5
        and uniform.std() == pytest.approx(12**-0.5, abs=0.01)
    )
    assert normal.std().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("rank", [None, 2])
def test_offsets_start_small_and_the_generic_one_at_zero(rank: int | None) -> None:
    weight = lookup(n_users=500, init="normal", rank=rank, offset_scale=0.2).offsets.weight
    assert weight[1:].std().item() == pytest.approx(0.2, abs=0.02)
    assert weight[0].abs().max() == 0.0


BAD = [
    (
        lambda: lookup(user_dim=4),
        "encoder.init='vocabulary' is not allowed: expected uniform or normal, as user vectors "
        "of 4 are no whole number of embeddings of 3. Set encoder.init=normal.",
    ),
    (
        lambda: lookup(init="zeros"),
        "encoder.init='zeros' is not allowed: expected vocabulary, uniform or normal. "
        "Set encoder.init=vocabulary.",
    ),
    (
        lambda: lookup(rank=0),
        "encoder.rank=0 is not allowed: expected a whole number from 1 or null. Set encoder.rank=1.",
    ),
    (
        lambda: lookup(offset_scale=-0.1),
        "encoder.offset_scale=-0.1 is not allowed: expected a number from 0. "
        "Set encoder.offset_scale=0.1.",
    ),
    (
        lambda: cluster(n_clusters=1),
        "encoder.n_clusters=1 is not allowed: expected a whole number from 2. "
        "Set encoder.n_clusters=10.",
    ),
    (
        lambda: cluster(weight_scale=-1.0),
        "encoder.weight_scale=-1.0 is not allowed: expected a number from 0. "
        "Set encoder.weight_scale=0.1.",
    ),
    (
        lambda: features(n_numbers=0, category_sizes=()),
        "encoder='features' is not allowed: expected rows with user_features. "
        "Give the rows user_features, or set encoder=lookup.",
    ),
    (
        lambda: features(hidden=0),
        "encoder.hidden=0 is not allowed: expected a whole number from 1. Set encoder.hidden=64.",
    ),
    (
        lambda: features(category_dim=0),
        "encoder.category_dim=0 is not allowed: expected a whole number from 1. "
        "Set encoder.category_dim=8.",
    ),
    (
        lambda: features(rank=0),
        "encoder.rank=0 is not allowed: expected a whole number from 1 or null. Set encoder.rank=1.",
    ),
    (
        lambda: features(dropout=1.0),
        "encoder.dropout=1.0 is not allowed: expected a number from 0 and below 1. "
        "Set encoder.dropout=0.0.",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_settings(build: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build()
    assert str(caught.value) == message


def shrunk(kind: str) -> Any:
    settings = {"shrinkage": "learned", "init": "normal"}
    if kind == "hybrid":
        own: Any = {"n_users": 4, "user_dim": WIDTH, "n_numbers": 2, "category_sizes": (3,)}
        return HybridEncoder(**own, vocabulary=TOKENS, rank=2, **settings)
    return {"lookup": lookup, "cluster": cluster, "features": features}[kind](**settings)


@pytest.mark.parametrize("kind", ["lookup", "cluster", "features", "hybrid"])
def test_shrunk_numbers_are_drawn_and_charged_in_training_alone(kind: str) -> None:
    torch.manual_seed(0)
    encoder = shrunk(kind)
    encoder.count_pairs(tensor([0, 3, 5, 1, 2]))
    asked = users(1, 2, 1, features=[[1.0, -1.0, 2.0], [0.5, 2.0, 0.0], [1.0, -1.0, 2.0]])
    drawn, penalty = encoder.encode(asked)
    assert penalty.shape == (3,) and (penalty > 0).all()
    assert not drawn[0].equal(drawn[2])
    if kind != "hybrid":
        numbers = encoder.numbers(asked) - encoder.prior_mean()
        each = tensor([[3.0], [5.0], [3.0]])
        torch.testing.assert_close(penalty, encoder.shrinkage(numbers, each))
    assert encoder.generic(2).equal(torch.zeros(2, encoder.generic(1).shape[1]))
    encoder.eval()
    fixed, none = encoder.encode(asked)
    assert none is None and fixed[0].equal(fixed[2])


def test_hybrid_adds_an_offset_to_what_features_say() -> None:
    encoder = shrunk("hybrid").eval()
    put(encoder.own.basis, [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    put(encoder.own.offsets.weight, [[0.0, 0.0], [3.0, 5.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    asked = users(1, 0, features=[[1.0, -1.0, 2.0], [1.0, -1.0, 2.0]])
    with_offset, unseen = encoder(asked)
    assert (with_offset - unseen).tolist() == pytest.approx([3.0, 10.0, 0.0], abs=1e-6)
    assert encoder(users(0, features=[[nan, nan, nan]]))[0].equal(encoder.generic(1)[0])
