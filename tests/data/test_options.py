"""Survey questions become choices among their options, by hand."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from plrhf.core.choices import plackett_luce
from plrhf.data.dataset import feedback_of
from plrhf.data.reading import read_rows
from plrhf.data.sources.jsonl import JsonlSource

ASKED = {"question": "Dredge it?", "options": ["Yes", "No", "Not sure"]}
REWARD = {"Yes": log(4.0), "No": log(2.0), "Not sure": 0.0}


def read(path: Path, records: list[Any]) -> Any:
    path.write_text("\n".join(json.dumps({**ASKED, "user": 7, **one}) for one in records))
    source = JsonlSource(path=str(path))
    return (*read_rows(source.records()), source.form)


def loss_of(rows: Any) -> float:
    """Sum of the weighted losses of all pairs; weights are those of the rows."""
    feedback = feedback_of(rows)
    margins = torch.tensor([REWARD[row.chosen] - REWARD[row.rejected] for row in rows])
    weights = torch.tensor([1.0 if row.weight is None else row.weight for row in rows])
    torch.testing.assert_close(feedback.weight, weights / weights.mean())
    return float((weights * plackett_luce(margins, feedback.choice)).sum())


def test_a_choice_is_that_option_against_all_others(tmp_path: Path) -> None:
    rows, report, form = read(
        tmp_path / "o.jsonl", [{"choice": "No"}, {"answer": 2, "pair_id": "b"}]
    )
    assert form == "options" and report.refused == {}
    assert [(row.chosen, row.rejected, row.group_id == "b") for row in rows] == [
        *(("No", "Yes", False), ("No", "Not sure", False)),
        *(("Not sure", "Yes", True), ("Not sure", "No", True)),
    ]
    assert {(row.user_id, row.prompt, row.weight) for row in rows} == {("7", "Dredge it?", None)}
    assert loss_of(rows) == pytest.approx(log(7 / 2) + log(7 / 1))


def test_shares_give_the_cross_entropy(tmp_path: Path) -> None:
    rows, *_ = read(tmp_path / "o.jsonl", [{"shares": [0.5, 0.25, 0]}, {"shares": [0, 3, 0]}])
    assert [row.weight for row in rows] == [0.5, 0.5, 0.25, 0.25, 3, 3]
    expected = 0.5 * log(7 / 4) + 0.25 * log(7 / 2) + 3 * log(7 / 2)
    assert loss_of(rows) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choice": "Maybe"}, "choice='Maybe' is not allowed: expected one of the options"),
        ({"choice": 3}, "choice=3 is not allowed: expected one of the options, or its place"),
        ({"choice": None}, "choice=None is not allowed"),
        ({"choice": "Yes", "options": ["Yes", "Yes "]}, "options=['Yes', 'Yes '] is not allowed"),
        ({"choice": "Yes", "options": ["Yes"]}, "options=['Yes'] is not allowed: expected 2 to 16"),
        ({"choice": "Yes", "options": "Yes|No"}, "options='Yes|No' is not allowed"),
        ({"choice": "Yes", "options": ["Yes", None]}, "options=['Yes', None] is not allowed"),
        ({"shares": [0.5, 0.5]}, "shares=[0.5, 0.5] is not allowed: expected a number from 0"),
        ({"shares": [0, 0, 0]}, "shares=[0, 0, 0] is not allowed"),
        ({"shares": [1, -1, 1]}, "shares=[1, -1, 1] is not allowed"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    rows, report, _ = read(tmp_path / "o.jsonl", [{"choice": "No"}, fields])
    assert len(rows) == 2
    assert report.refused == {"options or choice that cannot be read": 1}
    (said,) = report.examples.values()
    assert said.startswith(f"{tmp_path}/o.jsonl:2: {message}") and "\n" not in said
