"""The hub source on directories, which `datasets` loads as it loads the hub's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from pyarrow import parquet
from upstream import COMPARISONS, comparison, write_lines

from plrhf.data.reading import ReadReport, read_rows
from plrhf.data.rows import Row
from plrhf.data.sources.columns import ColumnMap
from plrhf.data.sources.hub import HubSource


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def read(path: Path | str, **settings: Any) -> tuple[list[Row], ReadReport]:
    return read_rows(HubSource(path=str(path), **settings).records())


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_chats(folder: Path) -> Path:
    """A common form of the hub: chosen and rejected are whole dialogues, and annotators numbers."""
    for split, size in (("train", 3), ("test", 2)):
        records = [
            {
                "instruction": f"Question {number}?",
                "chosen": [say("user", "?"), say("assistant", f"Good {split} {number}.")],
                "rejected": [say("user", "?"), say("assistant", f"Bad {number}.")],
                "annotator": {"number": number, "country": "France"},
                "extra": 0.5,
            }
            for number in range(size)
        ]
        write_lines(folder / f"{split}.jsonl", records)
    return folder


CHATS = {
    "prompt": "instruction",
    "chosen": "chosen.-1.content",
    "rejected": "rejected.-1.content",
    "user_id": "annotator.number",
    "user_features": "annotator",
}


def test_nested_columns(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "chats")
    rows, report = read(path, columns=CHATS)
    assert (report.read, report.refused) == (5, {})
    assert [(row.prompt, row.chosen, row.rejected, row.user_id) for row in rows[:2]] == [
        ("Question 0?", "Good train 0.", "Bad 0.", "0"),
        ("Question 1?", "Good train 1.", "Bad 1.", "1"),
    ]
    assert rows[1].user_features == {"number": 1.0, "country": "France"}
    assert {row.split for row in rows} == {None}  # divided later, by prompt


def test_splits_of_the_dataset(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "chats")
    rows, _ = read(path, columns=CHATS, splits={"test": "train", "train": "test"})
    assert [row.split for row in rows] == ["test"] * 3 + ["train"] * 2
    assert rows[0].chosen == "Good train 0."
    rows, report = read(path, columns=CHATS, splits={"train": "test"})
    assert (len(rows), report.read) == (2, 2)
    with pytest.raises(ValueError) as caught:
        read(path, columns=CHATS, splits={"val": "validation"})
    assert str(caught.value) == (
        "data.splits.val='validation' is not allowed: expected one of the dataset's splits train, "
        "test. Name one of these."
    )
    with pytest.raises(ValueError, match=r"data.splits='dev' .*one of train, val, test"):
        HubSource(path="x", splits={"dev": "validation"})


def test_a_list_where_text_belongs_is_refused(tmp_path: Path) -> None:
    mapping = {**CHATS, "rejected": "rejected"}
    rows, report = read(write_chats(tmp_path / "chats"), columns=mapping)
    assert rows == [] and report.refused == {"field that is not text": 5}
    where = f"{tmp_path / 'chats'}/train:1: rejected=[{{"
    assert report.examples["field that is not text"].startswith(where)


def test_parquet_and_a_path_that_ends_early(tmp_path: Path) -> None:
    records = [comparison("ann"), comparison(None), comparison("bob", post=None)]
    table = arrow.Table.from_pylist(records, schema=COMPARISONS)
    (tmp_path / "hub").mkdir()
    parquet.write_table(table, tmp_path / "hub/train.parquet")
    texts = {"chosen": "summaries.0.text", "rejected": "summaries.1.text"}
    mapping = {"prompt": "info.post", "user_id": "worker", **texts}
    rows, report = read(tmp_path / "hub", columns=mapping)
    assert [(row.user_id, row.chosen) for row in rows] == [("ann", " A long summary.")]
    assert report.refused == {"missing field": 2}
    _, report = read(tmp_path / "hub", columns={**mapping, "rejected": "summaries.7.text"})
    assert report.refused == {"missing field": 3}


def test_a_missing_column_is_one_error(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "chats")
    with pytest.raises(ValueError) as caught:
        read(path, columns={**CHATS, "user_id": "worker.id"})
    assert str(caught.value) == (
        "data.columns.user_id='worker.id' is not allowed: expected a column of the file. Map one "
        "with data.columns.user_id=COLUMN; the file has annotator, chosen, extra, instruction, "
        "rejected."
    )


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/train.parquet").write_text("no table")
    with pytest.raises(ValueError) as caught:
        read(tmp_path / "broken")
    assert str(caught.value).startswith("data.path='")
    assert "is not allowed: expected a dataset that can be loaded" in str(caught.value)
    assert "\n" not in str(caught.value)

    def load(*names: Any, **options: Any) -> None:
        assert names == ("who/what", "pairs") and options == {"revision": "main"}
        raise ConnectionError("cannot reach\nthe hub")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ValueError) as caught:
        read("who/what", config="pairs", revision="main")
    assert str(caught.value) == (
        "data.path='who/what' is not allowed: expected a dataset that can be loaded from the hub "
        "or a directory. Check data.path, data.config and data.revision (cannot reach the hub)."
    )


def test_a_name_with_dots_is_taken_whole() -> None:
    mapping = ColumnMap({"user_id": "worker.id"})
    assert mapping.row({"worker.id": 7, "worker": {"id": 8}})["user_id"] == "7"
    assert mapping.used(["worker.id", "worker", "prompt"]) == ["worker.id", "prompt"]
    assert ColumnMap({"chosen": "both.good"}).used(["both", "x"]) == ["both"]
