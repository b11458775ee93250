"""Ties, weights and strengths of rows: how they are read, kept, left out and handed on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_data import RECORDS, ListSource, make_data, record
from tiny import make_pairs

from plrhf.core.errors import BadValue
from plrhf.data.dataset import PairDataset
from plrhf.data.features import FeatureSchema
from plrhf.data.module import PreferenceData
from plrhf.data.packing import packed
from plrhf.data.parsing import parse_row
from plrhf.data.reading import read_rows
from plrhf.data.rows import Rows, choices_of
from plrhf.data.sources.jsonl import JsonlSource

PLAIN = {"prompt": "Hi?", "chosen": "a", "rejected": "b", "user_id": "u"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (None, None, None)),
        ({"verdict": "prefer", "weight": 2, "strength": "1.5"}, (None, 2.0, 1.5)),
        ({"verdict": " Tie", "weight": "0.25", "strength": ""}, ("tie", 0.25, None)),
        ({"weight": None, "strength": float("nan")}, (None, None, None)),
        ({"strength": 0}, (None, None, 0.0)),
    ],
)
def test_fields_are_read(fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    row = parse_row({**PLAIN, **fields}, "here:1")
    assert (row.verdict, row.weight, row.strength) == expected
    (stored,) = Rows.from_rows([row])
    assert stored == row


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"verdict": "skip"}, "verdict='skip' is not allowed: expected prefer or tie"),
        ({"weight": 0}, "weight=0 is not allowed: expected a number above 0, at most a million"),
        ({"weight": True}, "weight=True is not allowed"),
        ({"strength": -1}, "strength=-1 is not allowed: expected a number from 0"),
        ({"strength": "much"}, "strength='much' is not allowed"),
        ({"verdict": "tie", "strength": 1}, "strength=1 is not allowed: expected none in a tie"),
    ],
)
def test_bad_fields_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    rows, report = read_rows([("here:1", PLAIN), ("here:2", {**PLAIN, **fields})])
    assert len(rows) == 1 and sum(report.refused.values()) == 1
    (said,) = report.examples.values()
    assert said.startswith(f"here:2: {message}") and "\n" not in said


def test_ties_are_refused_unless_they_are_learned_from(tmp_path: Path) -> None:
    path = tmp_path / "arena.csv"
    with path.open("w", newline="") as file:
        head = ["prompt", "response_a", "response_b", "winner", "judge"]
        answers = ["a", "tie (bothbad)", "neither", "skip"]
        csv.writer(file).writerows([head, *(["Hi?", "x", "y", one, "ann"] for one in answers)])
    _, report = read_rows(JsonlSource(path=str(path)).records())
    assert report.refused == {"no response preferred": 3}
    rows, report = read_rows(JsonlSource(path=str(path)).records(), ties=True)
    assert [(row.chosen, row.verdict) for row in rows] == [("x", None), ("x", "tie"), ("x", "tie")]
    assert report.refused == {"no response preferred": 1}
    assert [row.chosen for row in choices_of(rows)] == ["x"]


TIED = [
    {**one, "verdict": "tie"} if one["pair_id"] in ("train4", "val2", "test3", "test4") else one
    for one in RECORDS
]


def test_only_train_keeps_ties(tokenizer: Any) -> None:
    data = make_data(tokenizer, records=TIED, ties="own")
    assert data.counts()["dropped"] == {"tie outside train": 3}
    assert data.counts()["rows"] == {"train": 17, "val": 4, "test": 5}
    feedback = data.datasets["train"].feedback
    assert feedback.is_tie.nonzero().flatten().tolist() == [4]
    assert data.datasets["val"].feedback is None
    without = make_data(tokenizer, records=TIED)
    assert without.counts()["rows"] == {"train": 16, "val": 4, "test": 5}
    assert without.counts()["refused"] == {"no response preferred": 4}


def test_ties_do_not_go_with_pairs_in_the_prompt() -> None:
    with pytest.raises(BadValue, match="model.ties='own' is not allowed: expected none with data"):
        PreferenceData(
            source=ListSource(),
            seed=0,
            batch_size=2,
            eval_batch_size=2,
            ties="own",
            context_pairs=2,
        )


def test_weights_are_one_on_average_and_follow_their_pairs() -> None:
    weights = [1.0, 4.0, None, 2.0]
    rows = [
        parse_row(record(n, "ann", "train", weight=one, strength=n), f"list:{n}")
        for n, one in enumerate(weights)
    ]
    given = {"layout": packed, "user_index": {"ann": 1}, "schema": FeatureSchema.fit(())}
    for some in (rows, Rows.from_rows(rows)):
        dataset = PairDataset(some, make_pairs(4), **given)  # type: ignore[arg-type]
        feedback = dataset.batch([1, 3]).feedback
        assert feedback is not None
        torch.testing.assert_close(feedback.weight, torch.tensor([2.0, 1.0]))  # the mean is 2
        assert feedback.strength.tolist() == [1.0, 3.0]
    plain = [parse_row(record(n, "ann", "train"), "here") for n in range(4)]
    assert PairDataset(plain, make_pairs(4), **given).batch([0]).feedback is None  # type: ignore[arg-type]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**PLAIN, "agreement": 3}))
    source = JsonlSource(path=str(path), columns={"weight": "agreement"})
    ((_, found),) = source.records()
    assert found["weight"] == 3  # type: ignore[index]
