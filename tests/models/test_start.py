"""Start values from train pairs, against numpy's factorisations and one start after the other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import WIDTH, make_backbone, make_batch, make_model, make_pairs
from torch import Tensor, tensor

from plrhf.aggregators import NoAggregator
from plrhf.core.mixed_logit import fit_mixed_logit
from plrhf.data.dataset import TextValues
from plrhf.encoders import LookupEncoder
from plrhf.models.factors import (
    are_judged_by_several_users,
    factors_of_coefficients,
    factors_of_judgments,
    principal_directions,
    truncated_svd,
)
from plrhf.models.reward import PersonalRewardModel
from plrhf.models.start import (
    HeadStart,
    PcaStart,
    SeveralStarts,
    build_start,
    train_loss,
    train_plainly,
)

N_USERS, D = 5, 6


def dataset(user_id: list[int], of_pair: list[list[int]], values: Tensor) -> Any:
    hidden = TextValues(values, tensor(of_pair))
    return SimpleNamespace(user_id=tensor(user_id), hidden=hidden)


def differences(pairs: Any) -> Tensor:
    both = pairs.hidden.values[pairs.hidden.of_pair].double()
    return both[:, 0] - both[:, 1]


def test_judgments_of_shared_pairs_are_factorised() -> None:
    """Where every user judged every pair, users times directions give the truncated SVD."""
    items = [(0, 1), (2, 3), (1, 4), (5, 0)]
    signs = np.where(np.random.default_rng(1).random((N_USERS, len(items))) < 0.5, -1.0, 1.0)
    users, of_pair = [], []
    for user in range(N_USERS):
        for (first, second), sign in zip(items, signs[user], strict=True):
            users.append(user + 1)
            of_pair.append([first, second] if sign > 0 else [second, first])
    pairs = dataset(users, of_pair, torch.randn(6, D))
    assert are_judged_by_several_users(pairs)
    vectors, basis = factors_of_judgments(
        pairs, differences(pairs), n_users=N_USERS, rank=2, ridge=1e-9
    )
    values = pairs.hidden.values.double()
    of_items = torch.stack([values[first] - values[second] for first, second in items])
    left, sizes, right = np.linalg.svd(signs, full_matrices=False)
    expected = (left[:, :2] * sizes[:2]) @ right[:2]
    np.testing.assert_allclose((vectors @ basis @ of_items.T).numpy(), expected, atol=1e-5)


def test_gaps_are_imputed_by_the_factors_themselves() -> None:
    """Against the whole matrix, filled in ten rounds; a pair judged both ways is known, and 0."""
    n_users, n_items, rank = 21, 34, 3
    draw = np.random.default_rng(2)
    known = draw.random((n_users, n_items)) < 0.3
    given = np.where(known, draw.choice([-1.0, 1.0], known.shape), 0.0)
    users, of_pair = [], []
    for user, item in zip(*np.nonzero(known), strict=True):
        users.append(int(user) + 1)
        of_pair.append([2 * item, 2 * item + 1][:: int(given[user, item])])
    again = int(np.nonzero(known[4])[0][0])
    users.append(5)
    of_pair.append([2 * again, 2 * again + 1][:: -int(given[4, again])])
    given[4, again] = 0.0
    pairs = dataset(users, of_pair, torch.randn(2 * n_items, n_items))
    found, basis = factors_of_judgments(
        pairs, differences(pairs), n_users=n_users, rank=rank, ridge=1e-9
    )
    filled = given
    for _ in range(10):
        left, sizes, right = np.linalg.svd(filled, full_matrices=False)
        low_rank = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        filled = np.where(known, given, low_rank)
    values = pairs.hidden.values.double()
    of_items = values[0::2] - values[1::2]
    np.testing.assert_allclose((found @ basis @ of_items.T).numpy(), low_rank, atol=1e-5)


def test_coefficients_of_users_are_factorised() -> None:
    users = [1, 1, 1, 2, 3, 3, 5, 5, 5, 5]
    pairs = dataset(users, [[2 * n, 2 * n + 1] for n in range(10)], torch.randn(20, D))
    assert not are_judged_by_several_users(pairs)
    found = differences(pairs)
    vectors, basis = factors_of_coefficients(pairs, found, n_users=N_USERS, rank=N_USERS, ridge=0.3)
    for user in range(1, N_USERS + 1):
        own = found[tensor(users) == user].numpy()
        ridge = np.linalg.solve(own.T @ own + 0.3 * np.eye(D), own.sum(axis=0))
        np.testing.assert_allclose((vectors @ basis)[user - 1].numpy(), ridge, atol=1e-8)
    with pytest.raises(ValueError, match=r"^aggregator\.user_dim=6 .* at most 5"):
        factors_of_coefficients(pairs, found, n_users=N_USERS, rank=6, ridge=0.3)


def test_principal_directions_give_margins_of_variance_one() -> None:
    found = torch.randn(50, D, dtype=torch.float64) @ torch.randn(D, D, dtype=torch.float64)
    directions = principal_directions(found, 3)
    _, sizes, right = np.linalg.svd(found.numpy(), full_matrices=False)
    for place in range(3):
        cosine = directions[place] @ right[place] / directions[place].norm()
        assert abs(float(cosine)) == pytest.approx(1)
    margins = found @ directions.T
    np.testing.assert_allclose(margins.square().mean(0).numpy(), 1.0)
    assert (margins.sign().sum(0) >= 0).all() and sizes[0] > sizes[2]


def basis_model(**settings: Any) -> Any:
    plain = {"aggregator": NoAggregator(hidden_size=WIDTH, user_dim=WIDTH), "head": "basis"}
    backbone = make_backbone(trainable="frozen")
    return make_model(PersonalRewardModel, backbone=backbone, **{**plain, **settings})


class Data:
    """A data module of one train batch."""

    def __init__(self, model: Any, n_pairs: int = 9) -> None:
        self.whole = model.without_user(make_batch(make_pairs(n_pairs)))
        self.user_id = self.whole.user_id
        self.hidden = TextValues(self.whole.hidden, self.whole.texts)
        self.datasets = {"train": self}

    def __len__(self) -> int:
        return len(self.whole)

    def batch(self, places: range) -> Any:
        assert len(places) == len(self)
        return self.whole

    def train_dataloader(self) -> list[Any]:
        return [self.whole]


def test_pca_fills_the_directions_and_their_reverses() -> None:
    model = basis_model()
    data: Any = Data(model)
    PcaStart().apply(model, data, total_steps=1)
    weight = model.head.basis.weight
    assert torch.equal(weight[0::2], -weight[1::2])
    both = data.hidden.values[data.hidden.of_pair].double()
    expected = principal_directions(both[:, 0] - both[:, 1], WIDTH // 2)
    torch.testing.assert_close(weight[0:8:2], expected[:4].float())
    for start in ("pca", "svd"):
        other = make_model(PersonalRewardModel, aggregator="film_last")
        with pytest.raises(ValueError, match=r"^model\.start=.* model\.head=basis"):
            build_start(start).apply(other, data, total_steps=1)
    with pytest.raises(ValueError, match=r"^model\.start='svd' .* rank null"):
        build_start("svd").apply(model, data, total_steps=1)


def test_a_model_starts_as_the_mixed_logit_of_its_train_pairs() -> None:
    """For every spread, the second of which begins from the variances that the first has learned."""
    head = {"name": "basis", "weights": "raw", "shared": True, "scale": 2.0}
    model = basis_model(head=head)
    model.encoder = LookupEncoder(
        n_users=N_USERS, user_dim=WIDTH, vocabulary=torch.zeros(1, 1), init="normal"
    )
    data: Any = Data(model.eval(), n_pairs=3 * WIDTH)
    data.user_id = 1 + torch.arange(3 * WIDTH) % N_USERS
    data.whole = replace(data.whole, user_id=data.user_id)
    found, user = differences(data), data.user_id - 1
    for spread in (3.0, 1.0):
        build_start({"name": "mixed_logit", "spread": spread}).apply(model, data, total_steps=1)
        own = found @ model.head.basis.weight.detach().double().T * 2.0
        fit = fit_mixed_logit(found, own, user, n_users=N_USERS, spread=spread)
        expected = fit.margins(found, own, user).float()
        assert expected.abs().max() > 0.1
        margins = model.context_margins(data.whole)
        torch.testing.assert_close(margins["user"].detach(), expected, atol=1e-4, rtol=0)
        shared = (found @ fit.shared).float()
        torch.testing.assert_close(margins["generic"].detach(), shared, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"^model\.start='mixed_logit' .*head\.shared=true"):
        build_start("mixed_logit").apply(basis_model(), data, total_steps=1)


def test_pca_is_of_what_a_layer_makes_of_the_texts() -> None:
    layer: Any = {"layer_width": 36, "layer_dropout": 0.5}
    reads: Any = {"aggregator": NoAggregator(hidden_size=WIDTH, user_dim=WIDTH, **layer)}
    model = basis_model(**reads, head={"name": "basis", "weights": "raw"})
    data: Any = Data(model)
    PcaStart().apply(model, data, total_steps=1)
    weight, bias = (one.detach().double().numpy() for one in model.aggregator.text_parameters())
    texts = data.hidden.values.double().numpy()
    spread = np.sqrt(texts.var(axis=1, keepdims=True) + 1e-5)
    values = np.tanh((texts - texts.mean(axis=1, keepdims=True)) / spread @ weight.T + bias)
    chosen, rejected = data.hidden.of_pair.T.numpy()
    expected = principal_directions(torch.from_numpy(values[chosen] - values[rejected]), 3)
    torch.testing.assert_close(model.head.basis.weight[:3], expected.float())


def test_a_published_head_is_where_everybody_starts(tmp_path: Any) -> None:
    path = tmp_path / "head.safetensors"
    direction = torch.randn(1, WIDTH)
    save_file({"score.weight": direction}, path)
    model, data = basis_model(), None
    before = model.head.basis.weight.detach().clone()
    HeadStart(path=str(path)).apply(model, data, total_steps=1)  # type: ignore[arg-type]
    torch.testing.assert_close(model.head.basis.weight, before + direction)
    linear = make_model(PersonalRewardModel, aggregator="film_last")
    HeadStart(path=str(path)).apply(linear, data, total_steps=1)  # type: ignore[arg-type]
    assert torch.equal(linear.head.weight, direction)
    with pytest.raises(ValueError, match=r"^model\.start\.key='w' .* to one of score\.weight"):
        HeadStart(path=str(path), key="w").apply(model, data, total_steps=1)  # type: ignore[arg-type]


def test_the_start_of_lowest_train_loss_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(number: int) -> Any:
        model = basis_model(head={"name": "basis", "std": 1.0})
        with torch.no_grad():  # the first of them is the worst
            model.head.basis.weight.copy_(
                torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(number))
                * (4.0 if number == 0 else 1.0)
            )
        return model

    numbers = iter((1, 2))
    monkeypatch.setattr(PersonalRewardModel, "reinitialised", lambda self: drawn(next(numbers)))
    model = drawn(0)
    data: Any = Data(model)
    losses, weights = [], []
    for number in range(3):
        candidate = drawn(number)
        train_plainly(candidate, data, steps=2, total_steps=10)
        losses.append(train_loss(candidate, data))
        weights.append(candidate.head.basis.weight.detach())
    state = torch.get_rng_state()
    SeveralStarts(n=3, share=0.2).apply(model, data, total_steps=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert min(losses) < losses[0]
    assert train_loss(model, data) == pytest.approx(min(losses))
    assert torch.equal(model.head.basis.weight, weights[losses.index(min(losses))])


def test_few_vectors_of_a_large_matrix_are_those_of_its_whole_decomposition() -> None:
    matrix = torch.randn(41, 67, dtype=torch.float64)
    left, sizes, right = truncated_svd(matrix, 3)
    every_left, every_size, every_right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(sizes, every_size[:3])
    expected = (every_left[:, :3] * every_size[:3]) @ every_right[:3]
    torch.testing.assert_close((left * sizes) @ right, expected)
