"""Users as tasks: means over users, tails, and inner steps against a loop over people."""

from __future__ import annotations

from dataclasses import replace
from math import exp
from typing import Any

import pytest
import torch
from tiny import WIDTH, assert_same, gradients, make_backbone, make_batch, make_model, make_pairs
from torch import Tensor, tensor

from plrhf.aggregators import NoAggregator
from plrhf.encoders import ClusterMixtureEncoder
from plrhf.models.inner import InnerLoop, fit_train_users, number_tasks
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reduction import Reduction
from plrhf.models.reward import PersonalRewardModel

USERS = [1, 1, 2, 1, 3, 3, 1]  # 4, 1 and 2 pairs


def sigma(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_a_mean_over_users_does_not_depend_on_batches() -> None:
    users, losses = tensor(USERS), tensor([1.0, 2.0, 10.0, 3.0, 5.0, 7.0, 6.0])
    reduction = Reduction("users", n_users=5)
    reduction.count(users)
    weights = reduction.weights(users)
    assert weights is not None
    assert float((weights * losses).mean()) == pytest.approx((3 + 10 + 6) / 3)
    for cut in (1, 3, 5):
        parts = [slice(0, cut), slice(cut, 7)]
        means = [(reduction.weights(users[one]) * losses[one]).mean() for one in parts]  # type: ignore[operator]
        total = cut / 7 * means[0] + (7 - cut) / 7 * means[1]
        assert float(total) == pytest.approx(19 / 3)
    assert Reduction("pairs", n_users=5).weights(users) is None


def test_the_tail_by_hand() -> None:
    users = tensor(USERS)
    reduction = Reduction("tail", n_users=5)
    reduction.count(users)
    assert reduction.tail_weights().tolist() == [0.5] * 5  # nobody was met
    reduction.record(users[:4], tensor([1.0, 2.0, 10.0, 3.0]))
    assert reduction.tail_weights().tolist() == [0.5] * 5  # nor before the step is done
    reduction.step()
    # L_1 = 2, L_2 = 10, tau = 6 and temperature 0.5.
    expected = [0.5, sigma(-8), sigma(8), 0.5, 0.5]
    assert reduction.tail_weights().tolist() == pytest.approx(expected, rel=1e-4)
    reduction.step()
    assert reduction.tail_weights().tolist() == pytest.approx(expected, rel=1e-4)
    weights = reduction.weights(users)
    assert weights is not None
    assert float(weights[2]) == pytest.approx(7 / 3 * sigma(8), rel=1e-4)


def test_tasks_by_hand() -> None:
    task, is_query = number_tasks(tensor([7, 4, 7, 7, 9, 4, 7, 7]), 0.4)
    assert task.tolist() == [2, 1, 2, 2, 3, 1, 2, 2]
    # 5 pairs of 7: two queries, the last; 2 of 4: one; 1 of 9: none.
    assert is_query.tolist() == [False] * 5 + [True] * 3


def model_of(**settings: Any) -> Any:
    aggregator = NoAggregator(hidden_size=WIDTH, user_dim=WIDTH)
    inner = {"steps": 2, "lr": 0.7, "query_share": 0.5}
    backbone = make_backbone(trainable="frozen")
    given = {"head": "basis", "alpha": 0.75, "inner": inner, **settings}
    return make_model(PersonalRewardModel, backbone=backbone, aggregator=aggregator, **given)


def naive_loss(model: Any, batch: Any) -> Tensor:
    """The loss of inner training, one person after the other."""
    total, n_queries = tensor(0.0), 0
    for user in (1, 2, 3):
        own = [place for place, one in enumerate(USERS) if one == user]
        n_query = round(0.5 * len(own) + 1e-9) if len(own) > 1 else 0
        support, query = own[: len(own) - n_query], own[len(own) - n_query :]

        def losses(places: list[int], z: Tensor, generic: bool = False) -> Tensor:
            texts = replace(
                batch,
                user_id=batch.user_id[places],
                texts=batch.texts[places],
                segment=batch.segment[places],
                input_ids=batch.input_ids[places],
            )
            vector = model.encoder.generic_vector + z @ model.encoder.basis
            vectors = vector.expand(len(places), -1)
            if generic:
                vectors = model.encoder.generic_vector.expand(len(places), -1)
            return -torch.nn.functional.logsigmoid(model.margins_for(texts, vectors)[0][0])

        z = torch.zeros(2, requires_grad=True)
        for _ in range(2):
            z = z - 0.7 * torch.autograd.grad(losses(support, z).mean(), z, create_graph=True)[0]
        if n_query > 0:
            of_query = 0.75 * losses(query, z) + 0.25 * losses(query, z, generic=True)
            total, n_queries = total + of_query.sum(), n_queries + n_query
    return total / n_queries


def test_inner_steps_are_those_of_one_person_after_the_other() -> None:
    model, twin = model_of(), model_of()
    batch = model.without_user(make_batch(make_pairs(), users=USERS))
    loss, _ = model.training_loss(batch)
    expected = naive_loss(twin, batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    found = gradients(model)
    table = found.pop("encoder.offsets.weight", None)  # what users start from is e_0 alone
    assert table is None or table.abs().max() == 0
    assert_same(
        found, {name: one for name, one in gradients(twin).items() if name in found}, atol=1e-5
    )
    assert {"encoder.generic_vector", "encoder.basis", "head.basis.weight"} == found.keys()


@pytest.mark.parametrize("aggregator", ["film_every_block", "soft_prompt"])
@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
def test_inner_steps_are_differentiated_through_the_trunk(kind: Any, aggregator: str) -> None:
    inner = {"steps": 2, "lr": 0.7, "query_share": 0.5}
    model = make_model(kind, backbone=make_backbone(), aggregator=aggregator, inner=inner)
    length = 2e-2
    if kind is PersonalRewardModel:
        length = 2e-3  # of a loss that bends more
        with torch.no_grad():
            model.head.weight *= 10
    batch = model.without_user(make_batch(make_pairs(), users=USERS))
    weight = model.encoder.basis

    def loss() -> Tensor:
        return model.training_loss(batch)[0]

    (gradient,) = torch.autograd.grad(loss(), weight)
    values = []
    with torch.no_grad():
        step = length * gradient / gradient.norm()
        for turn in (step, -2 * step):
            weight += turn
            values.append(float(loss()))
    slope = (values[0] - values[1]) / (2 * length)
    assert slope == pytest.approx(float(gradient.norm()), rel=2e-2)


class Pairs:
    """A dataset of one batch."""

    def __init__(self, batch: Any) -> None:
        self.whole, self.user_id = batch, batch.user_id

    def __len__(self) -> int:
        return len(self.whole)

    def batch(self, places: range) -> Any:
        assert [*places] == [*range(len(self))]
        return self.whole


def test_train_users_are_fitted_to_all_of_their_pairs() -> None:
    model = model_of()
    batch = model.without_user(make_batch(make_pairs(), users=USERS))
    fit_train_users(model, Pairs(batch), InnerLoop(steps=1, lr=0.5))  # type: ignore[arg-type]
    rows = model.encoder.offsets.weight.detach().clone()
    assert rows[[0, 4, 5]].abs().max() == 0 and rows[[1, 2, 3]].abs().amax(1).min() > 0
    with torch.no_grad():
        model.encoder.offsets.weight.zero_()
    for user in (1, 2, 3):
        own = tensor(USERS) == user
        model.zero_grad()
        model.loss(batch)  # of all pairs; those of one user count
        vectors, _ = model.user_vectors(batch, ("user",))
        margins, _ = model.margins_for(batch, vectors)
        (-torch.nn.functional.logsigmoid(margins[0][own])).mean().backward()
        torch.testing.assert_close(rows[user], -0.5 * model.encoder.offsets.weight.grad[user])


def test_clusters_learn_where_users_start() -> None:
    model = model_of()
    model.encoder = ClusterMixtureEncoder(
        n_users=5, user_dim=WIDTH, vocabulary=torch.empty(1, 1), init="normal", n_clusters=3
    )
    batch = model.without_user(make_batch(make_pairs(), users=USERS))
    model.training_loss(batch)[0].backward()
    rows = model.encoder.weights.weight.grad
    assert rows[0].abs().max() > 0 and rows[1:].abs().max() == 0


def test_inner_steps_need_users_with_parameters() -> None:
    model = model_of(personal=False, head="linear")
    model.alpha = 1.0
    with pytest.raises(ValueError, match=r"^model\.inner='NoneEncoder' .* model\.inner=null"):
        model.training_loss(make_batch(make_pairs(), users=USERS))
    with pytest.raises(ValueError, match=r"^model\.inner\.steps=0 is not allowed"):
        model_of(inner={"steps": 0})
