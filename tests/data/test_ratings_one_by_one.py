"""Ratings as rows of their own: levels of a scale in train, pairs of them in val and test."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_data import WORDS, make_data

from plrhf.core.errors import BadValue
from plrhf.data.reading import read_rows
from plrhf.data.sources.jsonl import JsonlSource
from plrhf.data.text_values import independent_pairs

HEAD = ["user", "prompt", "response", "rating", "split"]


def source(path: Path, lines: list[list[Any]], scale: list[int] | None) -> JsonlSource:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([HEAD, *lines])
    return JsonlSource(path=str(path), rating_scale=scale)


LINES = [
    ["ann", "Hi?", "a", 2, "train"],
    ["ann", "Hi?", "b", 5, "train"],
    ["ann", "Hi?", "c", 1, "test"],
    ["bob", "Hi?", "a", 3.0, "train"],
]


def test_each_rating_is_a_row_beside_its_pairs(tmp_path: Path) -> None:
    rows, report = read_rows(source(tmp_path / "r.csv", LINES, [1, 5]).records())
    found = [(row.user_id, row.chosen, row.rejected, row.rating_level) for row in rows]
    assert sorted(found, key=str) == [
        *(("ann", "a", "a", 1), ("ann", "b", "a", None), ("ann", "b", "b", 4)),
        *(("ann", "c", "c", 0), ("bob", "a", "a", 2)),  # of two splits no pair is made
    ]
    assert report.refused == {}
    pairs, report = read_rows(source(tmp_path / "r.csv", LINES, None).records())
    assert [(row.chosen, row.rejected, row.rating_level) for row in pairs] == [("b", "a", None)]
    assert report.refused == {"rating in no pair": 2}


@pytest.mark.parametrize("rating", [0, 6, 2.5, -3])
def test_ratings_outside_the_scale_are_refused_in_one_line(tmp_path: Path, rating: float) -> None:
    lines = [*LINES, ["bob", "Hi?", "b", rating, "train"]]
    rows, report = read_rows(source(tmp_path / "r.csv", lines, [1, 5]).records())
    assert len(rows) == 5 and report.refused == {"rating outside the scale": 1}
    (said,) = report.examples.values()
    assert f":6: rating={float(rating)} is not allowed: expected a whole number from 1 to 5" in said


def test_a_file_of_pairs_has_no_scale(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,chosen,rejected,user_id\nHi?,a,b,u\n")
    with pytest.raises(
        BadValue, match="model.rating_scale=.* expected null unless the file is one"
    ):
        list(JsonlSource(path=str(path), rating_scale=[1, 5]).records())


def rated(**fields: Any) -> list[list[Any]]:
    """Five texts rated by two users on each of ten prompts."""
    return [
        [
            user,
            f"write {n}",
            " ".join(WORDS[at : at + 2]),
            1 + (n + at) % 5,
            fields.get("split", ""),
        ]
        for n in range(10)
        for user in ("ann", "bob")
        for at in range(5)
    ]


def test_train_has_ratings_and_others_have_pairs(tmp_path: Path, tokenizer: Any) -> None:
    ratings = source(tmp_path / "r.csv", rated(), [1, 5])
    records = [one for _, one in ratings.records()]
    for one in records:
        one.pop("split")  # type: ignore[union-attr]
    data = make_data(tokenizer, records=records)
    train, test = data.datasets["train"], data.datasets["test"]
    assert train.feedback.rating.min() == 0 and train.feedback.rating.max() == 4
    assert test.feedback is None and len(test) > 0
    dropped = data.counts()["dropped"]
    assert dropped["pair of ratings that train has one by one"] == len(train) // 5 * 10
    assert dropped["rating outside train, where pairs of ratings are asked"] == 100 - len(train)
    counts = independent_pairs(train, data.n_users + 1)
    assert counts.tolist() == torch.bincount(train.user_id, minlength=3).tolist()
    batch = train.batch(range(4))
    n_texts = sum(len(train.pairs[at].prompt) + len(train.pairs[at].chosen) for at in range(4))
    assert batch.packing is not None and len(batch.packing.source) == n_texts  # each read once


def test_ratings_are_divided_by_prompt_or_response(tmp_path: Path, tokenizer: Any) -> None:
    records = [one for _, one in source(tmp_path / "r.csv", rated(), [1, 5]).records()]
    for one in records:
        one.pop("split")  # type: ignore[union-attr]
    allowed = "prompt or conversation or response where"
    with pytest.raises(BadValue, match=f"data.split_by='user' .* expected {allowed}"):
        make_data(tokenizer, records=records, split_by="user")
