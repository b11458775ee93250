"""Residuals of texts that repeat: whose they are, what they cost, and what features miss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pair_data import make_data
from tiny import WIDTH, make_backbone, make_model
from torch import tensor

from plrhf.aggregators import FiLM, NoAggregator
from plrhf.aggregators.text_residual import TextResidual
from plrhf.core.shrinkage import divergence
from plrhf.data.dataset import PairDataset, TextValues
from plrhf.data.module import PreferenceData
from plrhf.data.packing import TokenPair, packed
from plrhf.data.text_value_cache import text_keys
from plrhf.data.text_values import distinct_texts, repeated_texts
from plrhf.encoders import NoneEncoder
from plrhf.models.optim import Optim
from plrhf.models.parts import divide_parameters
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee.features import FixedFeatures
from plrhf.referee.protocol import margins_on
from plrhf.referee.side_by_side import Training, train_side_by_side

D, KEYS, COUNTS = 4, tensor([-5, 2, 9]), tensor([6, 2, 4])


def residual(n_pairs: int = 3) -> TextResidual:
    made = TextResidual(D, len(KEYS))
    made.know(KEYS, COUNTS, n_pairs)
    torch.nn.init.normal_(made.to_hidden.weight)
    return made


def test_a_text_has_its_own_residual_and_an_unknown_one_none() -> None:
    made, hidden, keys = residual().eval(), torch.randn(5, D), tensor([9, 7, -5, 2, 10])
    found = made(hidden, keys) - hidden
    rows = made.rows.weight
    expected = torch.stack([rows[3], 0 * rows[0], rows[1], rows[2], 0 * rows[0]])
    torch.testing.assert_close(found, expected @ made.to_hidden.weight.T)
    assert made.penalty() is None
    assert TextResidual(D, 0)(hidden, keys).equal(hidden)


def test_the_penalty_is_charged_once_a_text() -> None:
    made = residual(n_pairs=3).train()
    torch.nn.init.normal_(made.shrinkage.log_prior)
    made(torch.randn(2, D), tensor([2, 7]))
    # 12 texts in pairs, of which 3 are independent, with 6 texts: half of the counts.
    n_pairs = tensor([[3.0], [1.0], [2.0]])
    assert made.n_pairs[1:].equal(n_pairs)
    prior = made.shrinkage.log_prior.exp()
    variance = 1 / (n_pairs * made.shrinkage.log_information.exp() + 1 / prior)
    of_texts = divergence(made.rows.weight[1:], variance, prior).sum() / 3
    shrunk = made.to_hidden
    of_map = divergence(
        shrunk.weight, shrunk.shrinkage.variance(shrunk.n_pairs), shrunk.shrinkage.log_prior.exp()
    )
    torch.testing.assert_close(made.penalty(), of_texts + of_map.sum() / 3)
    unknown = torch.stack([made(torch.zeros(1, D), tensor([7]))[0] for _ in range(3)])
    assert not unknown.any()  # not even noise


def test_texts_are_counted_by_their_tokens_in_all_splits() -> None:
    a, b, c, d = (1, 2), (3,), (4, 4), (5,)
    pairs = [TokenPair((9,), a, b), TokenPair((9,), c, a), TokenPair((8,), a, d)]
    dataset = PairDataset.from_tokens([*pairs, TokenPair((8,), b, a)], layout=packed)
    keys, counts = repeated_texts(dataset)
    assert counts.tolist() == [2, 2] and (keys[1:] > keys[:-1]).all()
    other = PairDataset.from_tokens(
        [TokenPair((8,), a, c), TokenPair((9,), a, b)] * 2, layout=packed
    )
    theirs, _ = repeated_texts(other)
    assert len(set(keys.tolist()) & set(theirs.tolist())) == 2  # (9, a) and (8, a)


N_TEXTS, N_USERS = 6, 8


@pytest.fixture(scope="module")
def data(tokenizer: Any) -> PreferenceData:
    """Users who like the same of six texts, and features that say nothing of a text."""
    liked = [3, 0, 5, 1, 4, 2]
    rows = []
    for user in range(N_USERS):
        for one in range(N_TEXTS):
            for other in range(one):
                is_better = liked[one] > liked[other]
                texts = [f"boats {'far ' * number}home" for number in (one, other)]
                split = ("train", "val", "test")[min(2, (user + one + 3 * other) % 5)]
                chosen, rejected = texts if is_better else texts[::-1]
                who = {"user_id": f"u{user}", "pair_id": f"{user}-{one}-{other}", "split": split}
                rows.append({"prompt": "Write.", "chosen": chosen, "rejected": rejected, **who})
    found: PreferenceData = make_data(tokenizer, records=rows, batch_size=99, eval_batch_size=99)
    for dataset in found.datasets.values():
        texts, of_pair = distinct_texts(dataset.pairs)
        keys = torch.from_numpy(text_keys(texts))
        alike = torch.randn(D, generator=torch.Generator().manual_seed(2)).expand(len(keys), -1)
        dataset.hidden = TextValues(alike, of_pair, keys)
    return found


def model_of(data: PreferenceData, **aggregator: Any) -> Any:
    torch.manual_seed(0)
    backbone: Any = FixedFeatures(D)
    film = FiLM(hidden_size=D, n_blocks=1, user_dim=4, layer_width=8, **aggregator)
    rates: Any = {"user_lr": 0.1, "head_lr": 0.1, "warmup_steps": 0, "shrinkage_steps": 30}
    parts: Any = {"backbone": backbone, "encoder": NoneEncoder(), "aggregator": film, "alpha": 1.0}
    return PersonalRewardModel(**parts, n_users=N_USERS + 1, optim=Optim(**rates))


@pytest.mark.slow
def test_they_learn_what_features_do_not_say(data: PreferenceData) -> None:
    n_texts = len(repeated_texts(data.datasets["train"])[0])
    assert n_texts == N_TEXTS
    accuracies = []
    for settings in ({}, {"text_residual": True, "n_texts": n_texts}):
        models = [model_of(data, **settings) for _ in range(2)]
        found = train_side_by_side(models, data, Training(max_steps=60, val_every_n_steps=20))
        assert all(one.vmapped for one in found)
        test = data.datasets["test"]
        margins = margins_on(models[0], test, batch_size=99)[:, 0]
        accuracies.append(((margins > 0) + 0.5 * (margins == 0)).mean())
    assert accuracies == [0.5, 1.0]
    assert test.hidden is not None
    unknown = replace(test.batch([0, 1]), text_keys=torch.full((4,), 12345))
    unknown = replace(unknown, text_keys=unknown.text_keys[: len(unknown.hidden)])  # type: ignore[index, arg-type]
    assert models[0](unknown).abs().max() == 0


def test_their_priors_learn_at_the_rate_of_priors_and_they_at_that_of_text() -> None:
    for aggregator in (
        FiLM(hidden_size=WIDTH, n_blocks=1, text_residual=True, n_texts=3),
        NoAggregator(hidden_size=WIDTH, user_dim=WIDTH, text_residual=True, n_texts=3),
    ):
        head = "linear" if isinstance(aggregator, FiLM) else "basis"
        for personal in (True, False):
            if not personal and head == "basis":
                continue
            model = make_model(
                PersonalRewardModel,
                backbone=make_backbone(trainable="frozen"),
                aggregator=aggregator,
                head=head,
                personal=personal,
            )
            parts = {k: {id(one) for one in v} for k, v in divide_parameters(model).items()}
            own = aggregator.residual
            assert {id(own.rows.weight), id(own.to_hidden.weight)} <= parts["head"]
            priors = {id(one) for one in own.parameters()} & parts["shrinkage"]
            assert len(priors) == 4 and not priors & (parts["head"] | parts["user"])
            assert all(one.requires_grad for one in own.parameters())


def test_where_they_cannot_be_they_are_refused() -> None:
    film = FiLM(hidden_size=WIDTH, n_blocks=1, text_residual=True, n_texts=3)
    for kind, backbone in (
        (PersonalRewardModel, make_backbone()),
        (PersonalDPOPolicy, make_backbone()),
    ):
        with pytest.raises(ValueError, match=r"^aggregator\.text_residual=True is not allowed"):
            make_model(kind, backbone=backbone, aggregator=film)
