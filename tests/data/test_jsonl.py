"""The file source: four endings give the same rows, and damage is reported line by line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from pyarrow import parquet

from plrhf.data.reading import ReadReport, read_rows
from plrhf.data.rows import Row
from plrhf.data.sources.base import Source, id_as_text
from plrhf.data.sources.jsonl import JsonlSource

ROWS: list[dict[str, Any]] = [
    {
        "prompt": 'Say "hi",\nthen stop',
        "chosen": "héllo, world",
        "rejected": "no",
        "user_id": "ann",
        "pair_id": "a1",
        "user_text": None,
        "user_features": {"age": 31, "job": "cook"},
    },
    {
        "prompt": "Second",
        "chosen": "yes",
        "rejected": "no",
        "user_id": "bob",
        "pair_id": "b1",
        "user_text": "I am Bob.",
        "user_features": None,
    },
    {
        "prompt": "Third",
        "chosen": "maybe",
        "rejected": "never",
        "user_id": "bob",
        "pair_id": "b2",
        "user_text": None,
        "user_features": {"age": 4.5, "job": None},
    },
]


def write_csv(path: Path) -> None:
    lines = ["prompt,chosen,rejected,user_id,pair_id,user_text,user_features"]
    lines += [
        '"Say ""hi"",\nthen stop","héllo, world",no,ann,a1,,"{""age"": 31, ""job"": ""cook""}"'
    ]
    lines += ["Second,yes,no,bob,b1,I am Bob.,", "", 'Third,maybe,never,bob,b2,,"{""age"": 4.5}"']
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write(path: Path) -> None:
    text = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    if path.suffix == ".csv":
        write_csv(path)
    elif path.suffix == ".parquet":
        parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def read(path: Path, **columns: str) -> tuple[list[Row], ReadReport]:
    return read_rows(JsonlSource(path=str(path), columns=columns or None).records())


@pytest.mark.parametrize("name", ["r.jsonl", "r.JSONL", "r.jsonl.gz", "r.parquet", "r.csv"])
def test_every_ending_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    rows, report = read(tmp_path / name)
    assert report.read == 3
    assert report.refused == {}
    assert [row.prompt for row in rows] == ['Say "hi",\nthen stop', "Second", "Third"]
    assert [row.chosen for row in rows] == ["héllo, world", "yes", "maybe"]
    assert [row.user_id for row in rows] == ["ann", "bob", "bob"]
    assert [row.user_text for row in rows] == [None, "I am Bob.", None]
    assert [row.user_features for row in rows] == [
        {"age": 31.0, "job": "cook"},
        None,
        {"age": 4.5},
    ]


def test_places_are_lines_and_parquet_rows(tmp_path: Path) -> None:
    places = {"r.jsonl": [1, 2, 3], "r.csv": [2, 4, 6], "r.parquet": [1, 2, 3]}
    for name, numbers in places.items():
        write(tmp_path / name)
        source = JsonlSource(path=str(tmp_path / name))
        assert [where for where, _ in source.records()] == [
            f"{tmp_path / name}:{number}" for number in numbers
        ]


def test_bad_lines_are_refused_with_their_number_and_reading_goes_on(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b", "user_id": "u"}).encode()
    escape = good.replace(b'"a"', rb'"\ud800"')
    lines = [b"\xef\xbb\xbf" + good, b"{'a': 1}", b'{"a": "\xff"}', b"[1, 2]", b"  ", escape]
    lines += [b"9" * 5000, b"[" * 100_000, good]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows, report = read(path)
    assert len(rows) == 2
    assert report.read == 8
    assert report.refused == {"bad JSON": 3, "bad UTF-8": 2, "not a JSON object": 1}
    assert report.examples["bad JSON"] == (
        f"{path}:2: line=\"{{'a': 1}}\\n\" is not allowed: expected one JSON object; Expecting "
        "property name enclosed in double quotes at column 2. Mend or remove the line."
    )
    assert report.examples["bad UTF-8"].startswith(f"{path}:3: line=b'")
    assert "invalid start byte at byte 7" in report.examples["bad UTF-8"]
    assert report.examples["not a JSON object"].startswith(f"{path}:4: line=[1, 2] is not")


def test_bad_csv_rows_are_refused_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    lines = [b"prompt,chosen,rejected,user_id", b"p,a,b", b"p,a\xff,b,u", b'"p"x,a,b,u', b"p,a,b,7"]
    lines += [b"p," + b"long " * 40_000 + b",b,7", b'"open,a,b,u', b"p,a,b,u", b""]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))  # as Excel writes it
    rows, report = read(path)
    assert [row.user_id for row in rows] == ["7", "7", "u"]  # reading goes on behind the open quote
    assert report.read == 7
    assert report.refused == {"bad CSV": 3, "bad UTF-8": 1}
    assert report.examples["bad CSV"] == (
        f"{path}:2: line='p,a,b' is not allowed: expected 4 values, as in the header, not 3. "
        "Mend or remove the line."
    )
    assert report.examples["bad UTF-8"] == (
        f"{path}:3: chosen='a\\udcff' is not allowed: expected valid Unicode text. "
        "Save the file as UTF-8."
    )


def test_bad_utf8_in_parquet_costs_its_row_only(tmp_path: Path) -> None:
    table = arrow.table({"prompt": ["p"] * 3, "rejected": ["b"] * 3, "user_id": [4, 5, 6]})
    bytes_column = arrow.array([b"a", b"\xff", b"c"], arrow.binary())
    text = arrow.Array.from_buffers(arrow.string(), 3, bytes_column.buffers())
    path = tmp_path / "bad.parquet"
    parquet.write_table(table.append_column("chosen", text), path)
    rows, report = read(path)
    assert [(row.user_id, row.chosen) for row in rows] == [("4", "a"), ("6", "c")]
    assert report.refused == {"bad UTF-8": 1}
    assert report.examples["bad UTF-8"].startswith(f"{path}:2: ")


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "m.parquet"])
def test_column_map(tmp_path: Path, name: str) -> None:
    raw = {"query": "q", "good": "a", "rejected": "b", "worker": 12, "chosen": "unused"}
    path = tmp_path / name
    if path.suffix == ".csv":
        path.write_text(",".join(raw) + "\n" + ",".join(map(str, raw.values())))
    elif path.suffix == ".parquet":
        parquet.write_table(arrow.Table.from_pylist([raw]), path)
    else:
        path.write_text(json.dumps(raw))
    (row,), _ = read(path, prompt="query", chosen="good", user_id="worker")
    assert (row.prompt, row.chosen, row.rejected, row.user_id) == ("q", "a", "b", "12")
    with pytest.raises(ValueError) as caught:
        read(path, prompt="query", chosen="good", user_id="annotator")
    assert str(caught.value) == (
        "data.columns.user_id='annotator' is not allowed: expected a column of the file. Map one "
        "with data.columns.user_id=COLUMN; the file has chosen, good, query, rejected, worker."
    )


def test_jsonl_column_may_be_absent_from_some_lines(tmp_path: Path) -> None:
    base = {"prompt": "p", "chosen": "a", "rejected": "b", "user_id": "u"}
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in (base, {**base, "about": "tall"})))
    rows, _ = read(path, user_text="about")
    assert [row.user_text for row in rows] == [None, "tall"]


def test_table_without_a_required_column_is_one_error_not_a_million_refusals(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lacks.csv"
    path.write_text("prompt,chosen,user_id\np,a,u\n")
    with pytest.raises(ValueError, match=r"data.columns.rejected='rejected' is not allowed"):
        read(path)


def test_parquet_gaps_and_number_ids(tmp_path: Path) -> None:
    nan = float("nan")
    table = arrow.table(
        {
            "prompt": [[{"role": "user", "content": "p"}]] * 2,
            "chosen": ["a", "c"],
            "rejected": ["b", "d"],
            "user_id": [1.0, nan],
            "prompt_id": [3, 4],
            "user_text": [nan, nan],
            "split": [None, "test"],
        }
    )
    parquet.write_table(table, tmp_path / "gaps.parquet")
    (row,), report = read(tmp_path / "gaps.parquet")
    assert (row.user_id, row.prompt_id, row.user_text, row.split) == ("1", "3", None, None)
    assert row.prompt == ({"role": "user", "content": "p"},)
    assert report.refused == {"missing field": 1}


def test_unreadable_user_features_text(tmp_path: Path) -> None:
    path = tmp_path / "features.csv"
    path.write_text("prompt,chosen,rejected,user_id,user_features\np,a,b,u,age=3\n")
    _, report = read(path)
    assert report.refused == {"bad user features": 1}


def test_ids_as_text() -> None:
    given = [7, 7.0, "7", True, 7.5, None, [7]]
    assert [id_as_text(one) for one in given] == ["7", "7", "7", True, 7.5, None, [7]]


def test_wrong_paths_and_maps_name_field_and_cure(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data.path='rows.txt' .*\.jsonl \.jsonl\.gz \.json \.parquet"
    ):
        JsonlSource(path="rows.txt")
    with pytest.raises(
        ValueError, match=r"data.columns='text' is not allowed: expected one of pro"
    ):
        JsonlSource(path="rows.csv", columns={"text": "prompt"})
    with pytest.raises(ValueError, match=r"data.columns.prompt=3 is not allowed"):
        JsonlSource(path="rows.csv", columns={"prompt": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"data.path='none.csv' .*expected an existing file"):
        list(JsonlSource(path="none.csv").records())


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "text.parquet", "open.csv"])
def test_damaged_files_give_one_line(tmp_path: Path, name: str) -> None:
    content = b'"never closed\n'
    if name == "cut.jsonl.gz":
        content = gzip.compress(json.dumps(ROWS[0]).encode() * 50)[:-20]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read(tmp_path / name)
    assert "data.path=" in str(caught.value)
    assert "expected a readable, undamaged file. Copy or write it again (" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_source_knows_no_oracle_unless_it_says_so() -> None:
    assert JsonlSource(path="r.csv").oracle_margins() is None
    with pytest.raises(TypeError):
        Source()  # type: ignore[abstract]
