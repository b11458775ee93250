"""Models that read pairs: the run, its export, new people, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import runs
import torch
from test_export import data_of
from tiny import WIDTH, make_aggregator, make_backbone, make_batch, make_model, make_pairs

import plrhf
from plrhf.encoders import OddEncoder
from plrhf.models.adaptation import Encode
from plrhf.models.context import context_features, context_of_batches
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel


def encoder(user_dim: int) -> OddEncoder:
    vocabulary = torch.zeros(9, user_dim)
    return OddEncoder(n_users=5, user_dim=user_dim, hidden_size=WIDTH, vocabulary=vocabulary)


def rewards(model: Any, rows: Any, **user: str) -> torch.Tensor:
    asked = [
        {"prompt": row.prompt, "response": text, "user_id": row.user_id, **user}
        for row in rows
        for text in (row.chosen, row.rejected)
    ]
    found: torch.Tensor = model.score(asked).view(-1, 2)
    return (found[:, 0] - found[:, 1]).double()


@pytest.mark.slow
def test_an_export_knows_its_users_and_anybody_by_their_pairs(
    tmp_path: Path, cache_dir: Path
) -> None:
    run = tmp_path / "run"
    how = ["encoder=odd", "optim.user_lr=1e-1", f"cache_dir={cache_dir}", f"run_dir={run}"]
    runs.launch("train", *runs.TINY, *how)
    runs.check_run(run)
    model: Any = plrhf.load(run / "export")
    splits = data_of(run, model).splits
    rows = [row for row in splits.test if row.user_id in model.card.users]
    table = pd.read_parquet(run / "predictions.parquet").set_index(["context", "pair_id"])
    pairs = [row.pair_id for row in rows]
    expected = torch.tensor(table.loc["user"]["margin"].loc[pairs].to_numpy())
    torch.testing.assert_close(rewards(model, rows), expected, atol=1e-5, rtol=0)
    assert (expected - torch.tensor(table.loc["generic"]["margin"].loc[pairs].to_numpy())).any()

    # Fewer train pairs than encoder.max_pairs: a stored vector is that of all of them, by no fitting.
    someone = rows[0].user_id
    own = [row for row in splits.train if row.user_id == someone]
    pairs_of = [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in own]
    new = model.adapt(pairs_of)
    torch.testing.assert_close(new.vector, model.encoder.vectors[model.card.user_index(someone)])
    assert new.n_pairs == len(own) == 14 and new.rows is None
    assert torch.equal(model.adapt([]).vector, model.encoder.generic(1)[0].detach())

    before = rewards(model, rows[:3], user_id=someone)
    model.enrol("new", new)
    model.forget(rows[-1].user_id)
    again: Any = plrhf.load(run / "export")
    for one in (model, again):
        found = rewards(one, rows[:3], user_id="new")
        torch.testing.assert_close(found, before, atol=1e-5, rtol=0)
    assert rows[-1].user_id not in again.card.users


@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
def test_texts_of_a_context_are_seen_as_before_training(kind: Any) -> None:
    """Adapters that have learned something make no difference to them."""
    aggregator = make_aggregator("soft_prompt")
    parts = {"encoder": encoder(aggregator.user_dim), "aggregator": aggregator, "n_users": 6}
    model = kind(backbone=make_backbone(), **parts)
    plain = kind(backbone=make_backbone(trainable="frozen", lora=None), **parts)
    batch = make_batch(make_pairs())
    found = context_features(model, batch)
    torch.testing.assert_close(found, context_features(plain, batch))
    assert found.shape == (7, 2, WIDTH) and not found.requires_grad


def test_batches_become_one_context_a_user() -> None:
    """Every user has the pairs of all batches, in their order; one of them has none."""
    model = make_model(PersonalRewardModel)
    pairs = make_pairs()
    batches = [make_batch(pairs[:4], users=[2, 0, 2, 3]), make_batch(pairs[4:], users=[0, 2, 2])]
    context = context_of_batches(model, batches, n_users=4)
    assert context.present.sum(dim=1).tolist() == [2, 0, 4, 1]
    plain = torch.cat([context_features(model, batch) for batch in batches])
    for user, places in {0: [1, 4], 2: [0, 2, 5, 6], 3: [3]}.items():
        found = context.hidden[context.texts[user][context.present[user]]]
        torch.testing.assert_close(found, plain[places])


def test_an_encoder_that_reads_no_pairs_cannot_encode() -> None:
    with pytest.raises(
        ValueError, match=r"^eval\.adaptation='encode' is not allowed: expected a rule"
    ):
        Encode().fit(make_model(PersonalRewardModel), [], n_users=1)


def test_a_trunk_that_changes_as_a_whole_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        PersonalRewardModel(
            backbone=make_backbone(trainable="full", lora=None),
            encoder=encoder(WIDTH),
            aggregator=make_aggregator("film_last"),
            n_users=6,
        )
    assert str(error.value) == (
        "backbone.trainable='full' is not allowed: expected lora or frozen with an encoder that reads "
        "pairs, as it sees them by the trunk that training began with. Set backbone.trainable=lora, or "
        "encoder=lookup."
    )
