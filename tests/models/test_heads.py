"""Reward heads: rewards by hand, equal function classes, and many models in one vmapped call."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log, sqrt
from typing import Any

import pytest
import torch
from scipy.stats import norm
from tiny import (
    N_USERS,
    WIDTH,
    assert_same,
    gradients,
    make_backbone,
    make_batch,
    make_model,
    make_pairs,
    perturb,
)
from torch import Tensor, nn, tensor

from plrhf.aggregators import FiLM, NoAggregator
from plrhf.backbone.model import Backbone
from plrhf.core.types import PreferenceBatch
from plrhf.data.packing import packed, two_rows
from plrhf.encoders import (
    ClusterMixtureEncoder,
    FeatureMLPEncoder,
    LookupEncoder,
    NoneEncoder,
    UniformEncoder,
    UserEncoder,
)
from plrhf.models.heads import HEADS, LinearHead, RewardHead, build_head
from plrhf.models.reward import PersonalRewardModel, pool_prompts
from plrhf.referee.stack import Stack

D, K = 3, 2  # of the heads made by hand


class Product(RewardHead):
    """An outsider's head: the user's numbers times as many projections of the response."""

    reads_user = True

    def __init__(self, *, hidden_size: int, user_dim: int, scale: float) -> None:
        super().__init__()
        self.project, self.scale = nn.Linear(hidden_size, user_dim, bias=False), scale

    def forward(self, hidden: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        of_user = user.view(*hidden.shape[:2], 1, -1)
        return self.scale * (of_user * self.project(hidden)).sum(-1)


def test_a_head_is_handed_the_users_of_each_context() -> None:
    settings = {"_target_": f"{__name__}.Product", "scale": 2.0}
    model = make_model(PersonalRewardModel, aggregator="film_last", head=settings).eval()
    batch = make_batch(make_pairs())
    with torch.no_grad():
        found = model.context_margins(batch)
        user, _ = model.user_vectors(batch, ("user", "generic"))
        hidden = model.hidden_for(batch, user)
        for context, name in enumerate(("user", "generic")):
            vectors = user.view(2, len(batch), -1)[context]
            chosen, rejected = (
                2.0 * (vectors * model.head.project(hidden[context, :, which])).sum(1)
                for which in (0, 1)
            )
            torch.testing.assert_close(found[name], chosen - rejected)


def test_a_head_of_no_known_name_is_refused() -> None:
    for head in ("lineal", {"scale": 1.0}):
        with pytest.raises(ValueError, match=r"^model\.head=.* expected one of linear"):
            build_head(head, hidden_size=3, user_dim=2)
    with pytest.raises(ValueError, match=r"^model\.head\.scale=1\.0 is not allowed"):
        build_head({"name": "linear", "scale": 1.0}, hidden_size=3, user_dim=2)
    assert isinstance(build_head("linear", hidden_size=3, user_dim=2), LinearHead)


@pytest.mark.slow
def test_users_must_act_somewhere() -> None:
    def model(head: Any, *, personal: bool = True, aggregator: Any = None) -> Any:
        if aggregator is None:
            aggregator = NoAggregator(hidden_size=WIDTH, user_dim=WIDTH)
        return make_model(PersonalRewardModel, aggregator=aggregator, head=head, personal=personal)

    with pytest.raises(ValueError, match=r"^aggregator='NoAggregator' is not allowed.* users act"):
        model("linear")
    with pytest.raises(ValueError, match=r"^model\.head='BasisHead' .* Set encoder=uniform"):
        model("basis", personal=False)
    with pytest.raises(ValueError, match=r"^aggregator='FiLM' .* reads the prompt"):
        model({"name": "basis", "routed": True}, aggregator="film_last")
    with pytest.raises(ValueError, match=r"^model\.head\.weights='raw' .* that sum to 1\. Set"):
        model({"name": "basis", "weights": "raw", "mixes": "losses"})
    assert not model("basis").aggregator.user_acts
    assert model("linear", personal=False).alpha == 1.0


def by_hand(name: str | dict[str, Any], **weights: Any) -> tuple[RewardHead, Tensor, Tensor]:
    """A head of these weights, and rewards of chosen and rejected and the margin for one pair.

    Chosen (1, 2, -1), rejected (0, 1, 3), user (0.5, -1).
    """
    user_dim = 1 if name == "affine" else K
    head = build_head(name, hidden_size=D, user_dim=user_dim)
    state = head.state_dict()
    assert state.keys() == weights.keys()
    head.load_state_dict({key: tensor(value).view_as(state[key]) for key, value in weights.items()})
    hidden = tensor([[[[1.0, 2.0, -1.0], [0.0, 1.0, 3.0]]]])
    with torch.no_grad():
        user = tensor([[0.5, -1.0]])[:, :user_dim]
        margins, rewards = head.compare(head.read(hidden), user, None)  # type: ignore[arg-type]
    return head, rewards[0, 0], margins[0, 0]


def test_distance_affine_and_cosine_by_hand() -> None:
    weight, bias = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [0.5, -1.0]
    # f(chosen) = (0.5, 1), f(rejected) = (3.5, 0); less the user: (0, 2) and (3, 1).
    _, rewards, margin = by_hand("distance", **{"project.weight": weight, "project.bias": bias})
    assert rewards.tolist() == pytest.approx([-2.0, -sqrt(10)])
    assert float(margin) == pytest.approx(sqrt(10) - 2)
    cosines = {"project.weight": weight, "project.bias": bias, "log_scale": log(3.0)}
    _, rewards, _ = by_hand("cosine", **cosines)
    norms = [sqrt(1.25) * sqrt(1.25), 3.5 * sqrt(1.25)]
    assert rewards.tolist() == pytest.approx([3 * -0.75 / norms[0], 3 * 1.75 / norms[1]])
    _, rewards, _ = by_hand("affine", **{"shared.weight": [1.0, 1.0, 1.0]})
    assert rewards.tolist() == pytest.approx([1.5 * 2, 1.5 * 4])
    with pytest.raises(ValueError, match=r"^aggregator\.user_dim=2 .* expected 1"):
        build_head("affine", hidden_size=D, user_dim=2)


def test_points_lie_behind_as_many_layers_as_asked() -> None:
    head: Any = build_head({"name": "distance", "width": 5, "layers": 2}, hidden_size=D, user_dim=2)
    hidden = torch.randn(4, D)
    first, second, last = (one for one in head.project if isinstance(one, torch.nn.Linear))
    gelu = torch.nn.functional.gelu
    torch.testing.assert_close(head.read(hidden), last(gelu(second(gelu(first(hidden))))))
    deep = {"name": "cosine", "width": 5, "prompt_width": 4, "layers": 3, "dim": 2}
    cosine: Any = build_head(deep, hidden_size=D, user_dim=2)
    assert [len(one) for one in (cosine.project, *cosine.points)] == [7, 7, 7]


def sigma(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_basis_by_hand() -> None:
    basis = {"basis.weight": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.5]]}
    # Rewards of the directions: chosen (1, 1.5), rejected (0, 2.5), so margins (1, -1).
    _, rewards, _ = by_hand({"name": "basis", "weights": "raw", "scale": 2.0}, **basis)
    assert rewards.tolist() == pytest.approx([2 * (0.5 - 1.5), 2 * -2.5])
    shared = {"shared.weight": [[1.0, -1.0, 2.0]], **basis}
    _, rewards, _ = by_hand({"name": "basis", "weights": "raw", "shared": True}, **shared)
    assert rewards.tolist() == pytest.approx([0.5 - 1.5 - 3.0, -2.5 + 5.0])
    with pytest.raises(ValueError, match=r"^model\.head\.shared=True .* raw weights"):
        build_head({"name": "basis", "shared": True}, hidden_size=D, user_dim=K)
    share = sigma(1.5)  # softmax of (0.5, -1)
    _, rewards, margin = by_hand("basis", **basis)
    assert rewards.tolist() == pytest.approx(
        [share + (1 - share) * 1.5, (1 - share) * 2.5], rel=1e-5
    )
    assert float(margin) == pytest.approx(share - (1 - share), rel=1e-5)
    _, _, margin = by_hand({"name": "basis", "mixes": "probabilities"}, **basis)
    probability = share * sigma(1.0) + (1 - share) * sigma(-1.0)
    assert sigma(float(margin)) == pytest.approx(probability, rel=1e-5)
    head, _, margin = by_hand({"name": "basis", "mixes": "losses"}, **basis)
    loss = share * log(1 + exp(-1)) + (1 - share) * log(1 + exp(1))
    assert log(1 + exp(-float(margin))) == pytest.approx(loss, rel=1e-5)
    head.eval()
    hidden = tensor([[[[1.0, 2.0, -1.0], [0.0, 1.0, 3.0]]]])
    in_use, _ = head.compare(head.read(hidden), tensor([[0.5, -1.0]]), None)  # type: ignore[arg-type]
    assert float(in_use) == pytest.approx(2 * share - 1, rel=1e-5)
    with pytest.raises(ValueError, match=r"^model\.head\.weights='raw' .* softmax"):
        build_head(
            {"name": "basis", "mixes": "probabilities", "weights": "raw"}, hidden_size=3, user_dim=2
        )


def test_mean_and_variance_by_hand() -> None:
    weights = {
        "mean.weight": [1.0, 0.0, -1.0],
        "log_std.weight": [0.0, 1.0, 0.0],
        "log_std.bias": [-1.0],
    }
    _, rewards, margin = by_hand("mean_variance", **weights)
    assert rewards.tolist() == [2.0, -3.0]  # standard deviations exp(1) and 1
    assert sigma(float(margin)) == pytest.approx(norm.cdf(5 / sqrt(exp(2) + 1)), rel=1e-5)


def test_decoder_by_hand() -> None:
    settings = {"name": "decoder", "width": 2, "film": True}
    weights = {
        "body.0.weight": [[1.0, 0.0, 0.0, 0.0, 1.0]],
        "body.0.bias": [0.0],
        "body.2.weight": [[1.0], [-1.0]],
        "body.2.bias": [0.0, 0.0],
        "film.weight": [[2.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]],
        "film.bias": [0.0] * 4,
        "out.weight": [1.0, 1.0],
        "out.bias": [0.25],
    }
    _, rewards, _ = by_hand(settings, **weights)

    def leaky(x: float) -> float:
        return max(x, 0.2 * x)

    expected = []
    for first in (1.0 - 1.0, 0.0 - 1.0):
        one = leaky(first)
        tanh = [(exp(2 * x) - 1) / (exp(2 * x) + 1) for x in (1.0, -1.0)]
        expected.append((1 + tanh[0] / 2) * leaky(one) + leaky(-one) + tanh[1] / 2 + 0.25)
    assert rewards.tolist() == pytest.approx(expected, abs=1e-6)


def test_prompts_are_pooled_in_both_layouts() -> None:
    pairs = make_pairs(5)
    for pooling in ("mean", "last"):
        of_layout = []
        for layout in (packed, two_rows):
            batch = make_batch(pairs, layout=layout)
            hidden = batch.input_ids.float()[None, :, :, None]
            of_layout.append(pool_prompts(hidden, batch.segment, n_pairs=5, pooling=pooling))
        expected = [
            sum(one.prompt) / len(one.prompt) if pooling == "mean" else one.prompt[-1]
            for one in pairs
        ]
        for found in of_layout:
            assert found.shape == (1, 5, 2, 1)
            assert found[0, :, 0, 0].tolist() == pytest.approx(expected)
            assert torch.equal(found[:, :, 0], found[:, :, 1])


@pytest.mark.parametrize("layer_width", [None, 9])
@pytest.mark.parametrize(
    "head", [{"name": "basis", "routed": True}, {"name": "cosine", "prompt_width": 5, "dim": 4}]
)
def test_a_head_that_reads_prompts_is_given_them(
    head: dict[str, Any], layer_width: int | None
) -> None:
    users_in_head = NoAggregator(hidden_size=WIDTH, user_dim=WIDTH, layer_width=layer_width)
    model = make_model(PersonalRewardModel, aggregator=users_in_head, head=head).eval()
    pairs = make_pairs()
    with torch.no_grad():
        margins = model(make_batch(pairs))
        batch = model.without_user(make_batch(pairs))
        assert batch.hidden is not None and batch.hidden.shape[1] == 2 * WIDTH
        torch.testing.assert_close(model(batch), margins)  # as from values kept
        other = [replace_prompt(pair) for pair in pairs]
        pooled = model.without_user(make_batch(other)).hidden
        swapped = torch.cat([batch.hidden[:, :WIDTH], pooled[:, WIDTH:]], dim=1)
        assert not torch.allclose(model(replace(batch, hidden=swapped)), margins, atol=1e-4)
        parts = users_in_head.transform_texts(batch.hidden).chunk(2, dim=1)
        for found, text in zip(parts, batch.hidden.chunk(2, dim=1), strict=True):
            torch.testing.assert_close(found, users_in_head.transform_texts(text))


def test_the_cosine_to_a_point_that_the_prompt_moves() -> None:
    """Rewards and gradients of the plain formula, in two contexts."""
    torch.manual_seed(3)
    how: dict[str, Any] = {"name": "cosine", "prompt_width": 5, "dim": 4, "width": 7, "layers": 2}
    head: Any = build_head(how, hidden_size=D, user_dim=3)
    pooled, user = torch.randn(2, 5, 2, 2 * D), torch.randn(10, 3)
    pooled[:, ::2, :, D:] = torch.randn(D)  # pairs of one prompt, which is read once
    nothing: Any = None
    rewards = head(head.read(pooled), user, nothing)
    points = torch.stack([one(pooled[..., D:]) for one in head.points], dim=-2)
    share = user.view(2, 5, 1, 3).softmax(-1)
    point = (share[..., None] * points).sum(-2)
    cosine = nn.functional.cosine_similarity(head.project(pooled[..., :D]), point, dim=-1)
    expected = head.log_scale.exp() * cosine
    torch.testing.assert_close(rewards, expected)
    weights = torch.randn_like(rewards)
    found, plain = (
        torch.autograd.grad((weights * one).sum(), list(head.parameters()))
        for one in (rewards, expected)
    )
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gptj", "llama", "bert"])
@torch.no_grad()
def test_pooled_prompts_do_not_depend_on_other_rows(family: str) -> None:
    """Trunks skip outputs that nobody reads, which these prompts' are not."""
    users_in_head = NoAggregator(hidden_size=WIDTH, user_dim=WIDTH)
    model = make_model(
        PersonalRewardModel,
        backbone=make_backbone(family),
        aggregator=users_in_head,
        head={"name": "cosine", "prompt_width": 5, "dim": 4},
    ).eval()
    pairs = make_pairs()
    layout = two_rows if family == "bert" else packed  # a bert reads both ways
    together = model.pooled_trunk(make_batch(pairs, layout=layout))
    for place, pair in enumerate(pairs):
        alone = model.pooled_trunk(make_batch([pair], layout=two_rows))
        torch.testing.assert_close(alone[0], together[place], atol=1e-5, rtol=0)
        ids = torch.tensor([pair.prompt])
        hidden = model.backbone.trunk(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(
            hidden.mean(dim=0), together[place, 0, WIDTH:], atol=1e-5, rtol=0
        )


def replace_prompt(pair: Any) -> Any:
    return replace(pair, prompt=tuple(1 + one % 90 for one in pair.prompt))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone(trainable="frozen")


def encoders(user_dim: int, vocabulary: Tensor) -> dict[str, UserEncoder]:
    """Encoders of `N_USERS` users who differ."""
    given: dict[str, Any] = {"user_dim": user_dim, "vocabulary": vocabulary, "init": "normal"}
    features = {"n_numbers": 2, "category_sizes": [3]}
    return {
        "lookup": LookupEncoder(n_users=N_USERS, offset_scale=1.0, **given),
        "rank": LookupEncoder(n_users=N_USERS, rank=2, offset_scale=1.0, **given),
        "cluster": ClusterMixtureEncoder(n_users=N_USERS, n_clusters=3, weight_scale=1.0, **given),
        "features": FeatureMLPEncoder(**features, **given),  # type: ignore[arg-type]
        "uniform": UniformEncoder(**given),
    }


VARIANTS: dict[str, Any] = {
    **{name: name for name in HEADS if name not in ("linear", "mean_variance", "attend")},
    "attend": {"name": "attend", "pairs": 1, "width": 1, "attention_heads": 1},
    "film": {"name": "decoder", "film": True, "width": 6},
    "probabilities": {"name": "basis", "mixes": "probabilities", "routed": True},
    "losses": {"name": "basis", "mixes": "losses"},
    "shared": {"name": "basis", "weights": "raw", "shared": True},
    "prompt": {"name": "cosine", "prompt_width": 5, "dim": 4},
}


@pytest.mark.parametrize("head", VARIANTS)
def test_models_side_by_side_are_those_one_by_one(head: str, backbone: Backbone) -> None:
    """Every head under every encoder: values and gradients of its naive twin, by one vmapped call.

    `attend` groups users by their number of pairs, and costs less for one model after the other.
    """
    user_dim = 1 if head == "affine" else 3
    vocabulary = backbone.vocabulary()
    batch = replace(make_batch(make_pairs()), features=torch.randn(7, 3))
    batch.features[:, 2] = torch.arange(7) % 3
    for name in encoders(user_dim, vocabulary):
        models = [
            PersonalRewardModel(
                backbone=backbone,
                encoder=encoders(user_dim, vocabulary)[name],
                aggregator=NoAggregator(hidden_size=WIDTH, user_dim=user_dim),
                n_users=N_USERS + 1,
                head=VARIANTS[head],
            )
            for _ in range(2)
        ]
        pooled = models[0].without_user(batch)
        stack = Stack(models)
        gradients = stack.gradients(pooled)
        assert stack.vmapped == (head != "attend"), f"{head} with {name}"
        for place, model in enumerate(models):
            loss, _ = model.training_loss(pooled)
            loss.backward()
            own = dict(model.named_parameters())
            for parameter, gradient in gradients.items():
                expected = own[parameter].grad
                assert expected is not None
                torch.testing.assert_close(gradient[place], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", ["linear", "mean_variance", *VARIANTS])
def test_a_head_reads_distinct_texts_as_it_reads_those_of_pairs(
    head: str, backbone: Backbone
) -> None:
    """The twin hands the head both hidden states of every pair."""
    user_dim = 1 if head == "affine" else 3
    encoder = encoders(user_dim, backbone.vocabulary())["lookup"]
    model = PersonalRewardModel(
        backbone=backbone,
        encoder=encoder if head in VARIANTS else NoneEncoder(),
        aggregator=NoAggregator(hidden_size=WIDTH, user_dim=user_dim),
        head=VARIANTS.get(head, head),
        n_users=N_USERS + 1,
        alpha=0.4,
    ).eval()
    batch = model.without_user(make_batch(make_pairs()))
    assert batch.texts is not None
    batch = replace(batch, texts=batch.texts % 9)  # so that pairs share texts
    user, _ = model.user_vectors(batch, model.context_names)
    found = []
    for way in (model.margins_for, super(PersonalRewardModel, model).margins_for):
        model.zero_grad()
        margins, rewards = way(batch, user)
        (margins.sigmoid().sum() + rewards[..., 0].sum()).backward(retain_graph=True)
        found.append({"margins": margins, "rewards": rewards, **gradients(model)})
    assert_same(found[0], found[1], atol=1e-4)
    with torch.no_grad():
        kept = model.precomputed(batch)
        assert kept.read is not None and kept.hidden is not None
        nothing = replace(kept, hidden=torch.zeros_like(kept.hidden))  # is read no more
        torch.testing.assert_close(model.margins_for(nothing, user)[0], found[0]["margins"])


def film_model(backbone: Backbone, encoder: UserEncoder, film: FiLM) -> Any:
    return PersonalRewardModel(
        backbone=backbone, encoder=encoder, aggregator=film, n_users=N_USERS + 1
    ).eval()


def basis_model(backbone: Backbone, encoder: UserEncoder, user_dim: int, weights: str) -> Any:
    return PersonalRewardModel(
        backbone=backbone,
        encoder=encoder,
        aggregator=NoAggregator(hidden_size=WIDTH, user_dim=user_dim),
        head={"name": "basis", "weights": weights},
        n_users=N_USERS + 1,
    ).eval()


@torch.no_grad()
def test_clusters_in_film_are_lores_class(backbone: Backbone) -> None:
    """V'_k = w o (1 + G V_k) and the same softmax weights give the margins of cluster + FiLM."""
    film = FiLM(hidden_size=WIDTH, n_blocks=1, user_dim=4)
    perturb(film, "to_film")
    clusters = ClusterMixtureEncoder(
        n_users=N_USERS,
        user_dim=4,
        vocabulary=backbone.vocabulary(),
        n_clusters=3,
        init="normal",
        weight_scale=1.0,
    )
    ours = film_model(backbone, clusters, film)
    users = LookupEncoder(
        n_users=N_USERS, user_dim=3, vocabulary=backbone.vocabulary(), init="normal"
    )
    lore = basis_model(backbone, users, 3, "softmax")
    gamma = ours.aggregator.to_film.weight  # [d, D]
    lore.head.basis.weight.copy_(ours.head.weight * (1 + clusters.clusters @ gamma.T))
    users.generic_vector.copy_(clusters.weights.weight[0])
    users.offsets.weight.copy_(clusters.weights.weight - clusters.weights.weight[0])
    check_same_margins(ours, lore)


@torch.no_grad()
def test_low_rank_in_film_is_prefs_and_rfms_class(backbone: Backbone) -> None:
    """V = (w o (1 + G e_0); w o G S_j) and the numbers (1; z_u) give the margins of lookup + FiLM."""
    film = FiLM(hidden_size=WIDTH, n_blocks=1, user_dim=4)
    perturb(film, "to_film")
    vocabulary = backbone.vocabulary()
    given: dict[str, Any] = {"n_users": N_USERS, "vocabulary": vocabulary, "init": "normal"}
    low_rank = LookupEncoder(user_dim=4, rank=2, offset_scale=1.0, **given)
    ours = film_model(backbone, low_rank, film)
    users = LookupEncoder(user_dim=3, **given)
    pref = basis_model(backbone, users, 3, "raw")
    gamma, w = ours.aggregator.to_film.weight, ours.head.weight
    shared = w * (1 + low_rank.generic_vector @ gamma.T)
    assert low_rank.basis is not None
    pref.head.basis.weight.copy_(torch.cat([shared, w * (low_rank.basis @ gamma.T)]))
    users.generic_vector.copy_(tensor([1.0, 0.0, 0.0]))
    z = low_rank.offsets.weight
    users.offsets.weight.copy_(torch.cat([torch.zeros(len(z), 1), z], dim=1))
    check_same_margins(ours, pref)


def check_same_margins(one: Any, other: Any) -> None:
    """Assert that two models give the same margins, which differ between users."""
    batch = make_batch(make_pairs(14))
    found = one.context_margins(batch)
    for name, margins in other.context_margins(batch).items():
        torch.testing.assert_close(found[name], margins, atol=1e-4, rtol=1e-4)
    assert (found["user"] - found["generic"]).abs().max() > 0.1


def test_no_user_vectors_leave_the_text_as_it_is(backbone: Backbone) -> None:
    batch = make_batch(make_pairs())
    plain = make_model(
        PersonalRewardModel, backbone=backbone, aggregator="film_last", personal=False
    )
    bare = make_model(
        PersonalRewardModel,
        backbone=backbone,
        aggregator=NoAggregator(hidden_size=WIDTH),
        personal=False,
    )
    assert isinstance(bare.encoder, NoneEncoder)
    bare.head.load_state_dict(plain.head.state_dict())
    with torch.no_grad():
        assert torch.equal(bare(batch), plain(batch))


@pytest.mark.parametrize("personal", [True, False])
@pytest.mark.parametrize("shrinkage", ["fixed", "learned"])
def test_terms_of_texts_give_the_rewards_of_hidden_states(shrinkage: Any, personal: bool) -> None:
    """The twin modulates the hidden states of both responses of every pair; both draw the same maps."""
    film = FiLM(hidden_size=WIDTH, n_blocks=3, layer_width=37, shrinkage=shrinkage)
    perturb(film, "to_film")
    model = make_model(PersonalRewardModel, aggregator=film, personal=personal, alpha=0.4)
    pairs = make_batch(make_pairs())
    batch = model.without_user(pairs)
    user, _ = model.user_vectors(batch, model.context_names)
    found = []
    for way in (model.margins_for, super(PersonalRewardModel, model).margins_for):
        model.zero_grad()
        margins, rewards = way(batch, user)
        penalty = film.penalty() if shrinkage == "learned" and personal else torch.zeros(())
        assert penalty is not None
        (margins.square().sum() + rewards[..., 0].sum() + penalty).backward(retain_graph=True)
        values = {"margins": margins, "rewards": rewards, "penalty": penalty}
        found.append({**values, **gradients(model)})
    assert len(found[0]) > 4
    assert (found[0]["penalty"] > 0) == (shrinkage == "learned" and personal)
    assert_same(found[0], found[1], atol=1e-5)
