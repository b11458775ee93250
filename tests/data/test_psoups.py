"""Personalized Soups: six files, preferences out of the prompt, repeats left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from upstream import judgment, write_soups

from plrhf.data.reading import ReadReport, read_rows
from plrhf.data.rows import Row
from plrhf.data.sources.psoups import PREFERENCES, PsoupsSource
from plrhf.data.splits import Splits, split_rows
from plrhf.evaluation.probes import overlap

USERS = ["P1A", "P1B", "P2A", "P2B", "P3A", "P3B"]


def read(path: Path, **settings: Any) -> tuple[list[Row], ReadReport]:
    return read_rows(PsoupsSource(path=str(path), **settings).records())


def divided(rows: list[Row]) -> Splits:
    """As the data module does."""
    fractions = {"val_fraction": 0.2, "test_fraction": 0.3, "unseen_fraction": 0.0}
    applied = {"val_fraction", "test_fraction"}
    return split_rows(rows, seed=0, min_pairs_per_user=1, applied_by_source=applied, **fractions)


@pytest.mark.parametrize("folder", ["", "rm_training"])
def test_six_users_without_their_preference_in_the_prompt(folder: str, tmp_path: Path) -> None:
    rows, report = read(write_soups(tmp_path) / folder)
    assert (len(rows), report.read, report.refused) == (60, 60, {})
    assert [row.user_id for row in rows[::10]] == USERS
    assert rows[13].prompt == "<|user|>\nWhat is 3?\n<|assistant|>"
    assert (rows[13].chosen, rows[13].rejected) == ("P1B says 3.", "Not 3.")
    assert rows[13].user_text == PREFERENCES["P1B"]
    assert all(PREFERENCES[row.user_id] not in str(row.prompt) for row in rows)
    # The same question is one prompt, whoever asks it.
    assert len({row.prompt_id for row in rows}) == 10


def test_what_is_left_out(tmp_path: Path) -> None:
    again = judgment("P2A", "What is 3?", "P2A says 3.", "Not 3.")
    extra = {
        "P2A": [again, again, judgment("P2A", "Why?", "So.", "So.")],
        "P3B": [
            judgment("P3B", "Why?", "So.", ["No."]),
            judgment("P3B", "", "So.", "No."),
            judgment("P3B", "Why?", "So.", ""),
            {"user_input": None, "completion_a": "So.", "completion_b": "No."},
            {"user_input": ["Why?"], "completion_a": "So.", "completion_b": "No."},
            "no object",
        ],
    }
    rows, report = read(write_soups(tmp_path, extra))
    assert (len(rows), report.read) == (60, 69)
    assert report.refused == {
        "repeated judgment": 2,
        "chosen equal to rejected": 1,
        "field that is not text": 2,
        "empty prompt": 1,
        "empty response": 1,
        "missing field": 1,
        "not a JSON object": 1,
    }


def test_splits_by_pair_and_by_prompt(tmp_path: Path) -> None:
    path = write_soups(tmp_path)
    rows, _ = read(path, val_fraction=0.2, test_fraction=0.3, seed=1)
    of_split = {name: {r.prompt_id for r in rows if r.split == name} for name in ("train", "test")}
    sizes = [sum(row.split == name for row in rows) for name in ("train", "val", "test")]
    assert sum(sizes) == 60 and min(sizes) >= 4 and sizes[0] > 20
    assert len(of_split["train"] & of_split["test"]) > 5  # what `disjoint` is for
    assert overlap(divided(rows))["train_test"]["prompt"] > 10
    assert [row.split for row in read(path, seed=2)[0]] != [row.split for row in read(path)[0]]

    rows, _ = read(path, protocol="disjoint")
    splits = divided(rows)
    shared = overlap(splits)
    assert {shared[one]["prompt"] for one in ("train_val", "train_test", "val_test")} == {0}
    assert splits.users == tuple(USERS)


def test_prompt_as_a_chat_message(tmp_path: Path) -> None:
    rows, _ = read(write_soups(tmp_path), template=None)
    assert rows[0].prompt == ({"role": "user", "content": "What is 0?"},)
    assert PsoupsSource(path="x").profile("P3B") == "Generate a response in an unfriendly manner."


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.template='Q: ' .*text with \{prompt\}, or null"):
        PsoupsSource(path="x", template="Q: ")
    (write_soups(tmp_path) / "rm_training/P2B.json").unlink()
    with pytest.raises(ValueError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"data.path='{tmp_path}' is not allowed: expected the files P1A, P1B, P2A, P2B, P3A, P3B, "
        "and P2B is not there. Unpack upstream's archive again."
    )


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = write_soups(tmp_path)
    (folder / "rm_training" / "P1A.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"one file for P1A, not .*P1A.json and .*P1A.jsonl"):
        read(folder)
