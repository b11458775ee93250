"""The protocol: who is asked what, and the faults that it must not let pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from runs import rows_of_world, world, world_tokenizer, write_rows

from plrhf.aggregators import FiLM
from plrhf.data.module import PreferenceData
from plrhf.data.rows import Row
from plrhf.data.sources.jsonl import JsonlSource
from plrhf.data.sources.simulated import SimulatedSource
from plrhf.encoders import LookupEncoder, NoneEncoder
from plrhf.evaluation.trials import FewShotOptions, Trial
from plrhf.models.adaptation import Posterior
from plrhf.models.optim import Optim
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee.facts import Facts, agreed_pairs, span
from plrhf.referee.features import FixedFeatures, length_features, shape_features, with_features
from plrhf.referee.leaderboard import Entry, entries, warnings
from plrhf.referee.new_users import NEW, FewShots, add_new_users, new_user_margins
from plrhf.referee.protocol import as_other_users, referee_job, seen_margins, tune
from plrhf.referee.side_by_side import Training
from plrhf.referee.store import JobRecord

FACTS = Facts(agreed=set(), span={})
TRAINING = Training(max_steps=6, val_every_n_steps=3)


def read(source: Any, **settings: Any) -> PreferenceData:
    """Tokenised rows."""
    data = PreferenceData(
        source=source, seed=0, batch_size=32, eval_batch_size=32, max_tokens=128, **settings
    )
    data.tokenize(world_tokenizer(), layout="packed")
    return data


def builder(data: PreferenceData, *, personal: bool = True) -> Callable[[float], Any]:
    """Learning rate -> model on the data's features."""

    def build(rate: float) -> PersonalRewardModel:
        torch.manual_seed(1)
        hidden = data.datasets["train"].hidden
        assert hidden is not None
        backbone: Any = FixedFeatures(hidden.values.shape[1])
        film = FiLM(hidden_size=backbone.hidden_size, n_blocks=1, user_dim=4)
        vocabulary = torch.zeros(1, 1)
        lookup = LookupEncoder(
            n_users=data.n_users, user_dim=4, vocabulary=vocabulary, rank=2, init="normal"
        )
        return PersonalRewardModel(
            backbone=backbone,
            encoder=lookup if personal else NoneEncoder(),
            aggregator=film,
            n_users=data.n_users + 1,
            optim=Optim(user_lr=rate, head_lr=rate, warmup_steps=0),
            alpha=1.0,
        )

    return build


@pytest.fixture
def data() -> PreferenceData:
    """A small world with unseen users, texts by their shape."""
    found = read(world())
    add_new_users(found, layout="packed")
    return with_features(found, "shape")


@pytest.mark.slow
def test_a_job_asks_everybody_and_everybodys_controls(data: PreferenceData) -> None:
    options = FewShotOptions(shots=[0, 1, 2], draws=2)
    shots = FewShots.draw(data, set(), options, seed=0)
    assert shots is not None
    result = referee_job(
        [[0.01, 0.1], [0.3]], data, TRAINING, builder(data), shots, FACTS, rule=Posterior(), seed=0
    )
    margins = result.margins
    counts = margins.groupby(["user_kind", "who", "shots"]).size()
    assert counts["seen", "own", -1] == counts["seen", "wrong", -1] == 5 * 20
    assert counts["seen", "generic", -1] == counts["seen", "oracle", -1] == 5 * 20
    asked = 2 * 2 * (20 - 2)  # draws, unseen users, pairs that are not given
    assert counts["unseen", "own", 1] == counts["unseen", "wrong", 2] == asked
    assert counts["unseen", "oracle", 0] == asked
    assert result.record["numbers_per_user"] == 2 and len(result.tuned.trials) == 3
    losses = [one.val_loss for one in result.tuned.results]
    assert result.tuned.best == int(np.argmin(losses))
    zero = margins[(margins["shots"] == 0) & (margins["who"] == "own")]["margin"].to_numpy()
    generic = margins[(margins["user_kind"] == "unseen") & (margins["who"] == "generic")]
    np.testing.assert_allclose(
        zero, generic["margin"], atol=1e-5
    )  # nothing given: the generic user


@pytest.mark.slow
def test_a_grid_cannot_be_chosen_on_test(data: PreferenceData) -> None:
    """Test labels turned around change no choice; test pairs are out of reach of training."""
    rates = [0.01, 0.03, 0.1]
    before = tune([rates], data, TRAINING, builder(data))
    data.datasets["test"].user_id = data.datasets["test"].user_id.flip(0)
    hidden = data.datasets["test"].hidden
    assert hidden is not None
    hidden.of_pair = hidden.of_pair.flip(1)
    after = tune([rates], data, TRAINING, builder(data))
    assert (before.best, before.results) == (after.best, after.results)

    class Peeking(PersonalRewardModel):
        """Looks at test pairs where it should not."""

    def build(rate: float) -> Any:
        model = builder(data)(rate)
        model.training_loss = lambda batch: opened.datasets["test"]
        return model

    opened = data.restrict_to("train", "val")
    with pytest.raises(LookupError, match="test pairs are closed"):
        tune([[0.1]], data, TRAINING, build)


def test_a_pair_given_is_not_asked(data: PreferenceData) -> None:
    dataset = data.datasets[NEW]
    options = FewShotOptions(shots=[0, 2])
    model = builder(data)(0.1)
    with pytest.raises(ValueError, match="pairs that were not given"):
        shots = FewShots(options, dataset, [[Trial([0, 1], [1, 3]), Trial([4, 5], [6])]])
        new_user_margins(model, shots, Posterior(), batch_size=5)


def entry(method: str, result: Any) -> tuple[JobRecord, pd.DataFrame]:
    """A job as the store gives it back."""
    record = JobRecord(
        rows="rows",
        method=method,
        features=method,
        seed=0,
        fingerprint="",
        halvings=[],
        world=None,
        trials=[],
        **result.record,
    )
    return record, result.margins


@pytest.mark.slow
def test_a_label_by_format_is_called_a_leak(tmp_path: Path) -> None:
    """Chosen texts end with a bracket, as those of a list printed by Python do."""

    def said(leaks: bool) -> list[str]:
        rows = rows_of_world(n_users=12, pairs_per_user=20, test_pairs_per_user=12)
        for number, row in enumerate(rows):
            marks = "]." if leaks or number % 2 == 0 else ".]"
            row["chosen"] = row["chosen"][:60] + marks[0]
            row["rejected"] = row["rejected"][:60] + marks[1]
        found = read(JsonlSource(path=str(write_rows(tmp_path / "rows.jsonl", rows))))
        jobs = []
        for kind in ("length", "shape"):
            own = with_features(found, kind)  # type: ignore[arg-type]
            build = builder(own, personal=False)
            training = Training(max_steps=30, val_every_n_steps=10)
            result = referee_job([[0.1]], own, training, build, None, FACTS, rule=None, seed=0)
            jobs.append(entry(kind, result))
        (of_rows,) = entries(jobs).values()
        return warnings(of_rows)

    assert said(leaks=False) == []
    assert "leak by format" in said(leaks=True)[0]


def test_another_user_is_never_oneself(data: PreferenceData) -> None:
    test, train = data.datasets["test"], data.datasets["train"]
    others = as_other_users(test, train, seed=4)
    seen = test.user_id > 0
    assert (others.user_id[seen] != test.user_id[seen]).all()
    assert (others.user_id[~seen] == 0).all() and seen.any() and not seen.all()
    assert set(others.user_id.tolist()) <= set(train.user_id.tolist()) | {0}


def test_an_id_that_hardly_repeats_is_refused(data: PreferenceData) -> None:
    with pytest.raises(ValueError, match="compared 5 times each"):
        with_features(data, "item")


@pytest.mark.slow
def test_style_is_known_where_people_are_simulated(data: PreferenceData, tmp_path: Path) -> None:
    train = with_features(data, "style").datasets["train"]
    assert train.hidden is not None and isinstance(data.source, SimulatedSource)
    found = train.hidden[torch.arange(len(train))]
    for which, name in enumerate(("chosen", "rejected")):
        styles = np.array([data.source.style(getattr(row, name)) for row in train.rows])
        for style, feature in zip(styles.T, found[:, which].T, strict=True):
            assert np.corrcoef(style, feature)[0, 1] == pytest.approx(1.0)
    people = read(JsonlSource(path=str(write_rows(tmp_path / "rows.jsonl", rows_of_world()))))
    with pytest.raises(ValueError, match=r"^referee\.features='style' .* real people"):
        with_features(people, "style")


def test_features_of_texts() -> None:
    assert length_features("ab c") == pytest.approx([np.log(5), np.log(3)])
    words, other = shape_features("[ab c]"), shape_features("xyz wv")
    assert words[:2] == pytest.approx(other[:2]) and words != other


def test_pairs_that_nearly_all_agree_on() -> None:
    rows = []
    for pair, n_judges, dissent in (("p", 10, 1), ("q", 10, 2), ("r", 4, 0)):
        for user in range(n_judges):
            texts = ("yes", "no") if user >= dissent else ("no", "yes")
            ids = {"pair_id": f"{pair}{user}", "prompt_id": pair, "user_id": str(user)}
            rows.append(Row(prompt=pair, chosen=texts[0], rejected=texts[1], **ids))
    assert agreed_pairs(rows) == {f"p{user}" for user in range(10)}


def test_span_counts_directions_in_which_people_differ() -> None:
    """Users whose tastes lie in two of six dimensions, and users of one taste."""
    generator = torch.Generator().manual_seed(0)
    found = read(world())
    train = found.datasets["train"]
    n_users, n_pairs = 60, 40

    def spanned(rank: int) -> int:
        tastes = torch.zeros(n_users, 6)
        tastes[:, :rank] = torch.randn(n_users, rank, generator=generator)
        user = torch.arange(n_users).repeat_interleave(n_pairs)
        gaps = torch.randn(len(user), 6, generator=generator)
        sign = torch.where((gaps * tastes[user]).sum(1) + 0.5 * gaps[:, 5] > 0, 1.0, -1.0)
        texts = torch.stack([gaps * sign[:, None], torch.zeros_like(gaps)], dim=1).flatten(0, 1)
        train.user_id = user + 1
        train.hidden = type(found_hidden)(texts, torch.arange(len(texts)).view(-1, 2))
        return int(span(train)["spanned"])

    found_hidden: Any = with_features(found, "shape").datasets["train"].hidden
    assert (spanned(0), spanned(2)) == (0, 2)


def test_margins_of_seen_users_have_all_contexts(data: PreferenceData) -> None:
    model = builder(data, personal=False)(0.1)
    margins = seen_margins(model, data, seed=0)
    assert set(margins["who"]) == {"own", "generic", "oracle"}  # no person to take for another
    assert set(margins[margins["user_kind"] == "unseen"]["shots"]) == {0}
    assert isinstance(Entry("m", [], margins.assign(seed=0, person=margins["user_id"])), Entry)
