"""Rows of any origin: each form is read as it is meant, or refused with its reason and place."""

from __future__ import annotations

import csv
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from pyarrow import parquet

from plrhf.core.errors import BadValue
from plrhf.data.reading import ReadReport, read_rows
from plrhf.data.rows import Rows
from plrhf.data.sources.base import id_as_text
from plrhf.data.sources.jsonl import JsonlSource

CASES = Path(__file__).parent / "cases"
PLAIN = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "user_id": "ann"}


def read(path: Path) -> tuple[Rows, ReadReport]:
    return read_rows(JsonlSource(path=str(path)).records())


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records))
    return path


def test_messages_in_a_csv_cell_are_messages() -> None:
    rows, report = read(CASES / "msgs.csv")
    assert report.refused == {} and len(rows) == report.read > 0
    assert isinstance(rows[0].prompt, tuple) and rows[0].prompt[0]["role"] == "user"


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("[{'role': 'user', 'content': \"it's\"}]", ({"role": "user", "content": "it's"},)),
        ('[{"content": "a", "role": "user"}]', ({"role": "user", "content": "a"},)),
        ("[1, 2]", "[1, 2]"),
        ("[citation needed]", "[citation needed]"),
    ],
)
def test_a_cell_is_messages_only_if_it_spells_them(
    tmp_path: Path, cell: str, expected: object
) -> None:
    rows, _ = read(written(tmp_path / "a.jsonl", {**PLAIN, "prompt": cell}))
    assert rows[0].prompt == expected


def test_messages_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    cell = "[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}"
    rows, report = read(written(tmp_path / "a.jsonl", {**PLAIN, "prompt": cell}, PLAIN))
    assert (len(rows), report.refused) == (1, {"field that is not text": 1})


def test_ids_of_one_person_are_one_id() -> None:
    one = ["1", "1.0", "1.00", 1, 1.0, Decimal("1"), Decimal("1.0")]
    assert {id_as_text(value) for value in one} == {"1"}
    kept = ["01.0", "1.5", "v1.0", "a", "", "1.", True, 1.5, float(2**60), Decimal("1.5")]
    assert [id_as_text(value) for value in kept] == kept


def test_ids_are_the_same_from_csv_json_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,user_id\nWhy?,So.,No.,1.0\n")
    written(tmp_path / "a.jsonl", {**PLAIN, "user_id": 1})
    for name, value in (("d", Decimal("1.00")), ("b", b"1"), ("f", 1.0)):
        parquet.write_table(
            arrow.Table.from_pylist([{**PLAIN, "user_id": value}]), tmp_path / f"{name}.parquet"
        )
    ids = {read(path)[0][0].user_id for path in sorted(tmp_path.iterdir())}
    assert ids == {"1"}


@pytest.mark.parametrize("name", ["dec.parquet", "bin.parquet"])
def test_decimal_and_binary_ids_are_read(name: str) -> None:
    written_ids = parquet.read_table(CASES / name)["user_id"].to_pylist()
    rows, report = read(CASES / name)
    assert report.refused == {} and len(rows) == report.read
    as_text = [one.decode() if isinstance(one, bytes) else str(one) for one in written_ids]
    assert [row.user_id for row in rows] == as_text


@pytest.mark.parametrize("name", ["dup.csv", "dup.parquet"])
def test_a_column_twice_is_refused(name: str) -> None:
    with pytest.raises(BadValue, match="column='user_id' is not allowed: expected a name that one"):
        read(CASES / name)


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PLAIN)[:-1] + ', "user_id": "bob"}\n' + json.dumps(PLAIN))
    rows, report = read(path)
    assert [row.user_id for row in rows] == ["ann"]
    assert "key 'user_id' twice" in report.examples["bad JSON"]


def test_empty_and_nan_ids_are_refused(tmp_path: Path) -> None:
    rows, report = read(CASES / "nan.csv")
    with (CASES / "nan.csv").open(newline="") as file:
        cells = [record["user_id"] for record in csv.DictReader(file)]
    assert report.refused == {"missing field": cells.count("")} and "" in cells
    assert [row.user_id for row in rows] == [one.removesuffix(".0") for one in cells if one]
    nameless = [{**PLAIN, "user_id": one} for one in ("nan", "None", float("nan"), None, " ")]
    rows, report = read(written(tmp_path / "a.jsonl", *nameless, PLAIN))
    assert (len(rows), report.refused) == (1, {"missing field": 5})
    rows, _ = read(written(tmp_path / "b.jsonl", {**PLAIN, "pair_id": "nan", "prompt_id": "None"}))
    assert "nan" not in rows[0].pair_id and rows[0].prompt_id != "None"


def test_case_of_a_split_does_not_matter(tmp_path: Path) -> None:
    rows, _ = read(written(tmp_path / "a.jsonl", {**PLAIN, "split": " Train "}))
    assert rows[0].split == "train"


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8", "utf-8-sig"]
)
@pytest.mark.parametrize("ending", ["jsonl", "csv", "list.jsonl", "jsonl.gz", "packed.jsonl"])
def test_encodings_and_containers_are_recognised(
    tmp_path: Path, encoding: str, ending: str
) -> None:
    prompt = "Wörter\u2028im\u0085Text"
    records = [{**PLAIN, "prompt": prompt}, {**PLAIN, "user_id": "bob"}]
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
    if ending == "csv":
        text = f"prompt,chosen,rejected,user_id\n{prompt},So.,No.,ann\nWhy?,So.,No.,bob\n"
    if ending == "list.jsonl":
        text = json.dumps(records, indent=1, ensure_ascii=False)
    content = text.encode(encoding)
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(content) if ending.startswith(("jsonl.gz", "pa")) else content)
    rows, report = read(path)
    assert report.refused == {}
    assert [(row.prompt, row.user_id) for row in rows] == [(prompt, "ann"), ("Why?", "bob")]


@pytest.mark.parametrize("name", ["u16.jsonl", "list.jsonl"])
def test_utf16_and_lists_are_read(name: str) -> None:
    rows, report = read(CASES / name)
    assert report.refused == {} and len(rows) == report.read > 10


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    parquet.write_table(arrow.Table.from_pylist([PLAIN]), tmp_path / "a.jsonl")
    with pytest.raises(BadValue, match="a parquet file: name it .parquet"):
        read(tmp_path / "a.jsonl")


def test_a_list_as_a_feature_is_refused_with_its_place() -> None:
    path = CASES / "featlist.jsonl"
    _, report = read(path)
    example = report.examples["bad user features"]
    assert example.startswith(f"{path}:1: user_features.langs=['fi', 'sv']")


def test_a_stray_quote_costs_its_own_row(tmp_path: Path) -> None:
    lines = [f"p{n},good {n},bad {n},u" for n in range(100)]
    for place, line in (
        (10, '"p10,a,b,u'),
        (40, 'p,"a,b,u'),
        (41, 'p,"well, yes",b,u'),
        (70, "p,a,b"),
    ):
        lines[place] = line
    (tmp_path / "a.csv").write_text("\n".join(["prompt,chosen,rejected,user_id", *lines]))
    rows, report = read(tmp_path / "a.csv")
    assert (report.read, len(rows), report.refused) == (100, 97, {"bad CSV": 3})
    assert report.examples["bad CSV"].startswith(f"{tmp_path}/a.csv:12: ")


def test_a_csv_cell_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'prompt,chosen,rejected,user_id\np,"one\ntwo\n",b,u\np,"say ""hi""",b,u\n'
    )
    rows, report = read(tmp_path / "a.csv")
    assert [row.chosen for row in rows] == ["one\ntwo\n", 'say "hi"'] and report.read == 2


USER = {"role": "user", "content": "What colour is the sky?"}
BLUE, GREEN = ({"role": "assistant", "content": one} for one in ("It is blue.", "It is green."))
FORMS = {
    "standard, explicit": {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    "standard, implicit": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    "conversational, explicit": {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
    "conversational, implicit": {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    "text and whole conversations": {
        "prompt": USER["content"],
        "chosen": [USER, BLUE],
        "rejected": [USER, GREEN],
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_every_preference_form_of_trl_is_read(tmp_path: Path, form: str, ending: str) -> None:
    record = {**FORMS[form], "user_id": "ann"}
    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        written(path, record)
    else:
        parquet.write_table(arrow.Table.from_pylist([record]), path)
    rows, report = read(path)
    assert report.refused == {}
    if form.startswith("standard"):
        assert (rows[0].prompt, rows[0].chosen, rows[0].rejected) == (
            "The sky is",
            " blue.",
            " green.",
        )
    else:
        assert (rows[0].prompt, rows[0].chosen, rows[0].rejected) == (
            (USER,),
            "It is blue.",
            "It is green.",
        )


def test_no_prompt_is_guessed_where_the_prompt_has_another_name(tmp_path: Path) -> None:
    said = {"chosen": "The sea.", "rejected": "The wave.", "user_id": "ann"}
    _, report = read(written(tmp_path / "a.jsonl", {"question": "Why?", **said}))
    assert report.refused == {"missing field": 1}
    _, report = read(written(tmp_path / "b.jsonl", PLAIN, said, {"prompt": None, **said}))
    assert report.refused == {"missing field": 2}


@pytest.mark.parametrize(
    "last", [[BLUE, USER], [USER], [{**BLUE, "tool_calls": [{"function": {"name": "f"}}]}]]
)
def test_a_response_is_one_message(tmp_path: Path, last: list[Any]) -> None:
    record = {"chosen": [USER, BLUE], "rejected": [USER, *last], "user_id": "ann"}
    _, report = read(written(tmp_path / "a.jsonl", record))
    assert report.refused == {"bad chat messages": 1}


def test_one_missing_age_among_a_thousand_costs_nothing_and_a_wrong_one_its_row(
    tmp_path: Path,
) -> None:
    ages: list[Any] = [20 + n % 50 for n in range(1000)]
    ages[0], ages[500], ages[700] = "n/a", "old", "44"
    people = [
        {**PLAIN, "user_id": f"u{n}", "user_features": {"age": age}} for n, age in enumerate(ages)
    ]
    rows, report = read(written(tmp_path / "a.jsonl", *people))
    assert (len(rows), report.refused) == (999, {"bad user features": 1})
    assert report.examples["bad user features"].startswith(
        f"{tmp_path}/a.jsonl:501: user_features.age='old' is not allowed"
    )
    assert rows[0].user_features is None
    assert {row.user_id: row.user_features for row in rows}["u700"] == {"age": 44.0}
    with pytest.raises(BadValue, match=r"a.jsonl:501: user_features.age='old'"):
        read_rows(JsonlSource(path=str(tmp_path / "a.jsonl")).records(), on_bad_row="error")


def test_a_number_among_categories_is_a_category(tmp_path: Path) -> None:
    grades = ["K", "K", "one", 2, "1"]
    people = [
        {**PLAIN, "user_id": f"u{n}", "user_features": {"grade": one}}
        for n, one in enumerate(grades)
    ]
    rows, report = read(written(tmp_path / "a.jsonl", *people))
    assert report.refused == {}
    assert [(row.user_features or {})["grade"] for row in rows] == ["K", "K", "one", "2", "1"]


def test_fields_that_are_not_read_are_named_once(tmp_path: Path) -> None:
    records = [{**PLAIN, "tie": False, "strength": 2, "margin": 1.5}, {**PLAIN, "tie": True}]
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        path = tmp_path / name
        if name.endswith("parquet"):
            parquet.write_table(arrow.Table.from_pylist(records), path)
        elif name.endswith("csv"):
            path.write_text(
                "prompt,chosen,rejected,user_id,tie,strength,margin\nWhy?,a,b,u,0,2,1\n"
            )
        else:
            written(path, *records)
        _, report = read(path)
        assert "strength: in 1 rows, used where model.target_margin is above 0" in report.lines()
        assert [one for one in report.lines() if "not read" in one] == [
            "fields not read: tie, margin"
        ]


def test_the_terminal_hears_of_refusals_and_of_nothing_else(tmp_path: Path) -> None:
    rows, report = read(written(tmp_path / "a.jsonl", PLAIN))
    assert report.lines() == []
    bad = [{**PLAIN, "chosen": ""}, {**PLAIN, "chosen": " "}, {**PLAIN, "user_id": "\u001b[2J "}]
    bad[2]["split"] = "\u001b[2J"
    _, report = read(written(tmp_path / "b.jsonl", PLAIN, *bad))
    assert report.lines()[:2] == [
        "refused: 3 of 4 records",
        f"  2 empty response, first {tmp_path}/b.jsonl:2: chosen='' is not allowed: expected text "
        "that is not blank. Leave the row out.",
    ]
    assert "\u001b" not in "".join(report.lines())


def test_where_nothing_is_usable_the_error_says_why(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", *[{"query": "q", "good": "a", "bad": "b"}] * 3)
    _, report = read(path)
    with pytest.raises(BadValue) as caught:
        report.check_some_left()
    assert str(caught.value) == (
        "rows='0 of 3 usable' is not allowed: expected rows of the row format (refused: 3 missing "
        f"field). Mend what the first one names: {path}:1: prompt=None is not allowed: expected a "
        "value in every row. Add prompt or map it with data.columns.prompt=COLUMN; the row has bad, "
        "good, query."
    )
    with pytest.raises(BadValue, match="rows='0 records'"):
        read_rows([])[1].check_some_left()


def test_a_row_too_large_for_a_block_is_refused(tmp_path: Path) -> None:
    fits, too_large = ({**PLAIN, "chosen": "é" * n} for n in (249_990, 250_001))
    rows, report = read(written(tmp_path / "a.jsonl", fits, too_large))
    assert (len(rows), report.refused) == (1, {"row too large": 1})
    path = tmp_path / "b.jsonl.gz"
    bomb = b'{"prompt": "' + b"a" * 9_000_000 + b'"}'
    path.write_bytes(gzip.compress(bomb + b"\n" + json.dumps(PLAIN).encode()))
    rows, report = read(path)
    assert (len(rows), report.refused) == (1, {"row too large": 1})
    assert report.examples["row too large"].startswith(f"{path}:1: ")


def test_parquet_values_that_python_cannot_hold_cost_their_row(tmp_path: Path) -> None:
    days = arrow.array([0, 2**31 - 1, 0], arrow.int32()).cast(arrow.date32())
    columns = {**{name: [value] * 3 for name, value in PLAIN.items()}, "user_id": days}
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table(columns), path)
    _, report = read(path)
    assert report.read == 3 and report.refused["bad parquet value"] == 1
