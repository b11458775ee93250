"""HyRe: members that learn from half of the users each, and users as weights over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from runs import world, world_tokenizer
from torch import Tensor

from plrhf.aggregators import NoAggregator
from plrhf.core.types import UserBatch
from plrhf.data.module import PreferenceData
from plrhf.encoders import EnsembleEncoder
from plrhf.models.adaptation import Reweight
from plrhf.models.optim import Optim
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee.features import FixedFeatures, with_features
from plrhf.referee.side_by_side import Training, train_side_by_side

K = 5


@pytest.fixture(scope="module")
def data() -> PreferenceData:
    found = PreferenceData(source=world(), seed=3, batch_size=70, eval_batch_size=7, max_tokens=128)
    found.tokenize(world_tokenizer(), layout="packed")
    return with_features(found, "shape")


def build(data: Any, optim: Optim | None = None) -> Any:
    torch.manual_seed(5)
    width = data.datasets["train"].hidden.values.shape[1]
    vocabulary = torch.zeros(1, 1)
    return PersonalRewardModel(
        backbone=FixedFeatures(width),
        encoder=EnsembleEncoder(n_users=data.n_users, user_dim=K, vocabulary=vocabulary),
        aggregator=NoAggregator(hidden_size=width, user_dim=K),
        n_users=data.n_users + 1,
        head={"name": "basis", "weights": "raw", "mixes": "losses"},
        optim=optim,
        alpha=1.0,
    )


def people(*ids: int) -> UserBatch:
    return UserBatch(user_id=torch.tensor(ids), features=torch.zeros(len(ids), 0))


def test_each_member_learns_from_half_of_the_users() -> None:
    torch.manual_seed(2)
    encoder = EnsembleEncoder(n_users=400, user_dim=K, vocabulary=torch.zeros(1, 1))
    torch.manual_seed(2)
    again = EnsembleEncoder(n_users=400, user_dim=K, vocabulary=torch.zeros(1, 1))
    halves = encoder(people(*range(401)))
    assert halves.equal(again(people(*range(401))))
    assert set(halves.flatten().tolist()) == {0.0, 0.5} and halves.sum(1).unique().tolist() == [1.0]
    assert (((halves > 0).float().mean(0) - 0.4).abs() < 0.1).all()
    assert len((halves > 0).unique(dim=0)) == 10  # all ways to choose two of five
    encoder.eval()
    torch.testing.assert_close(encoder(people(0, 7)), torch.full((2, K), 1 / K))


def differences(data: Any) -> Tensor:
    hidden = data.datasets["train"].hidden
    both = hidden.values[hidden.of_pair]
    return both[:, 0] - both[:, 1]


def test_a_member_has_the_gradient_of_its_own_users_alone(data: PreferenceData) -> None:
    model = build(data)
    train = data.datasets["train"]
    model.training_loss(train.batch(range(len(train))))[0].backward()
    basis, own = model.head.basis.weight, differences(data)
    for member in range(K):
        learned = basis[member].detach().clone().requires_grad_()
        losses = []
        for pair, user in zip(own, train.user_id.tolist(), strict=True):
            if model.encoder.halves[user, member] > 0:
                losses.append(torch.nn.functional.softplus(-learned @ pair))
        assert 0 < len(losses) < len(train)
        (torch.stack(losses).sum() / (2 * len(train))).backward()
        torch.testing.assert_close(basis.grad[member], learned.grad, atol=1e-6, rtol=1e-4)


def likely_weights(model: Any, data: Any, user: int) -> np.ndarray:
    """The weights of a user over the members, by hand."""
    own = differences(data)[data.datasets["train"].user_id == user].double().numpy()
    margins = own @ model.head.basis.weight.detach().double().numpy().T  # [n, K]
    likely = np.exp(-np.log1p(np.exp(-margins)).sum(0))
    return likely / likely.sum()


def test_train_users_are_weights_by_likelihood_as_new_ones_are(data: PreferenceData) -> None:
    models = [build(data, Optim(head_lr=lr, warmup_steps=0)) for lr in (0.1, 0.3)]
    found = train_side_by_side(models, data, Training(max_steps=20, val_every_n_steps=10))
    assert all(one.vmapped for one in found) and {one.step for one in found} <= {10, 20}
    train = data.datasets["train"]
    for model in models:
        assert model.encoder(people(0)).tolist() == [pytest.approx([1 / K] * K)]
        for user in range(1, data.n_users + 1):
            expected = likely_weights(model, data, user)
            np.testing.assert_allclose(model.encoder(people(user))[0], expected, atol=1e-4)
            places = (train.user_id == user).nonzero()[:, 0].tolist()
            batch = train.batch(places)
            batch.user_id = torch.zeros(len(batch), dtype=torch.int64)
            new = Reweight(of="clusters").fit(model, [batch], n_users=1).vectors[0]
            np.testing.assert_allclose(new, expected, atol=1e-4)
    assert not np.allclose(likely_weights(models[0], data, 1), likely_weights(models[0], data, 2))
