"""Rows: what is accepted, every reason to refuse, and that no record is lost."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plrhf.data.parsing import parse_row
from plrhf.data.reading import read_ids, read_rows
from plrhf.data.reasons import Reason, Refusal, RefusedRow

GOOD = {"prompt": "Write.", "chosen": "long text", "rejected": "short", "user_id": "ann"}


def record(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


def test_full_row_keeps_every_field() -> None:
    raw = record(
        prompt_id="p1",
        pair_id="x1",
        user_text="I like cats.",
        user_features={"age": 31, "north": True, "job": "cook", "gap": None, "nan": math.nan},
        split="val",
        chosen_id="c",
        rejected_id="r",
        score=5,
    )
    row = parse_row(raw, "f:1")
    assert (row.prompt, row.chosen, row.rejected) == ("Write.", "long text", "short")
    assert (row.user_id, row.prompt_id, row.pair_id) == ("ann", "p1", "x1")
    assert (row.user_text, row.split, row.chosen_id, row.rejected_id) == (
        "I like cats.",
        "val",
        "c",
        "r",
    )
    assert row.user_features == {"age": 31.0, "north": "true", "job": "cook"}


def test_absent_optional_fields_are_none() -> None:
    blank = dict.fromkeys(("user_text", "split", "pair_id", "user_features"))
    row = parse_row(record(**blank, prompt_id=" ", chosen_id=math.nan), "f:1")
    assert row == parse_row(GOOD, "f:1")
    assert row.user_text is row.user_features is row.split is row.chosen_id is None


def test_chat_prompt_becomes_messages_of_role_and_content() -> None:
    messages = [{"role": "system", "content": ""}, {"content": "Hi", "role": "user", "n": 1}]
    row = parse_row(record(prompt=messages), "f:1")
    assert row.prompt == (
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi"},
    )


REFUSED = [
    (without("chosen"), Reason.MISSING_FIELD, "chosen=None"),
    (record(user_id=None), Reason.MISSING_FIELD, "user_id=None"),
    (record(user_id=" "), Reason.MISSING_FIELD, "user_id=' '"),
    (record(prompt=[{"role": "user"}]), Reason.MISSING_FIELD, "prompt[0].content=None"),
    (record(rejected=["short"]), Reason.NOT_TEXT, "rejected=['short'] is not allowed"),
    (record(chosen=3), Reason.NOT_TEXT, "chosen=3 is not allowed: expected text."),
    (record(user_id=["ann"]), Reason.NOT_TEXT, "user_id=['ann']"),
    (record(user_id=7), Reason.NOT_TEXT, "user_id=7"),
    (record(prompt=["Hi"]), Reason.NOT_TEXT, "prompt[0]='Hi'"),
    (record(prompt=[{"role": "user", "content": 1}]), Reason.NOT_TEXT, "prompt[0].content=1"),
    (record(user_text=["a"]), Reason.NOT_TEXT, "user_text=['a']"),
    (record(prompt=" \n"), Reason.EMPTY_PROMPT, r"prompt=' \n'"),
    (record(prompt=[]), Reason.EMPTY_PROMPT, "prompt=[]"),
    (record(chosen="\t"), Reason.EMPTY_RESPONSE, r"chosen='\t'"),
    (record(rejected=""), Reason.EMPTY_RESPONSE, "rejected=''"),
    (record(rejected="long text \n"), Reason.SAME_RESPONSES, r"rejected='long text \n'"),
    (record(split="dev"), Reason.UNKNOWN_SPLIT, "split='dev' is not allowed: expected train,"),
    (record(chosen="\ud800"), Reason.BAD_UTF8, r"chosen='\ud800'"),
    (record(user_features={"a\udcff": 1}), Reason.BAD_UTF8, "user_features="),
    (record(user_features=[1]), Reason.BAD_USER_FEATURES, "user_features=[1]"),
    (record(user_features={"age": math.inf}), Reason.BAD_USER_FEATURES, "user_features.age=inf"),
    (record(user_features={"age": 10**400}), Reason.BAD_USER_FEATURES, "user_features.age=1000"),
    (record(user_features={"tags": ["a"]}), Reason.BAD_USER_FEATURES, "user_features.tags=['a']"),
    (record(user_features={3: "a"}), Reason.BAD_USER_FEATURES, "user_features=3"),
]


@pytest.mark.parametrize(("raw", "reason", "shown"), REFUSED)
def test_refusal_names_place_field_value_and_cure(
    raw: dict[str, Any], reason: Reason, shown: str
) -> None:
    with pytest.raises(RefusedRow) as caught:
        parse_row(raw, "pairs.jsonl:17")
    message = str(caught.value)
    assert caught.value.reason is reason
    assert message.startswith(f"pairs.jsonl:17: {shown}")
    assert " is not allowed: expected " in message
    assert "\n" not in message


def test_half_a_character_and_a_byte_of_another_encoding_have_cures_of_their_own() -> None:
    for text, cure in (
        ("\ud800", r"Pair every \ud800-\udfff escape."),
        ("\udce9", "Save the file as UTF-8."),
    ):
        with pytest.raises(RefusedRow) as caught:
            parse_row(record(chosen=text), "a.csv:3")
        assert str(caught.value).endswith(f"expected valid Unicode text. {cure}")


def test_whole_message() -> None:
    with pytest.raises(RefusedRow) as caught:
        parse_row(record(split="dev"), "a.csv:3")
    assert str(caught.value) == (
        "a.csv:3: split='dev' is not allowed: expected train, val or test. "
        "Rename it, or leave split out of every row."
    )


def test_read_rows_counts_every_record() -> None:
    records: list[tuple[str, Any]] = [
        ("f:1", record(pair_id="x")),
        ("f:2", record(pair_id="x", chosen="other")),
        ("f:3", Refusal(Reason.BAD_JSON, "line='{' is not allowed")),
        ("f:4", without("prompt")),
        ("f:5", without("user_id")),
        ("f:6", record(pair_id="y")),
    ]
    rows, report = read_rows(iter(records))
    assert [row.pair_id for row in rows] == ["x", "y"]
    assert report.read == 6
    assert report.refused == {"duplicate pair id": 1, "bad JSON": 1, "missing field": 2}
    assert report.examples["bad JSON"] == "f:3: line='{' is not allowed"
    assert report.examples["missing field"].startswith("f:4: prompt=None")
    assert report.examples["duplicate pair id"] == (
        "f:2: pair_id='x' is not allowed: expected an id used once. "
        "Give every row its own: record 1 has it too."
    )


def test_a_refused_row_does_not_use_up_its_pair_id() -> None:
    records = [("f:1", record(pair_id="x", chosen="")), ("f:2", record(pair_id="x"))]
    rows, report = read_rows(records)
    assert len(rows) == 1
    assert report.refused == {"empty response": 1}


def test_error_mode_raises_the_first_refusal() -> None:
    records = [("f:1", GOOD), ("f:2", record(chosen=[])), ("f:3", without("prompt"))]
    with pytest.raises(ValueError, match=r"^f:2: chosen=\[\] is not allowed: expected text\."):
        read_rows(records, on_bad_row="error")
    refusal = Refusal(Reason.BAD_UTF8, "line=b'x' is not allowed")
    with pytest.raises(ValueError, match=r"^f:9: line=b'x' is not allowed"):
        read_rows([("f:9", refusal)], on_bad_row="error")


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="data.on_bad_row='skip' .*expected refuse or error"):
        read_rows([], on_bad_row="skip")


def test_derived_ids() -> None:
    same_prompt = record(chosen="new")
    rows, _ = read_rows([("f:1", GOOD), ("f:2", same_prompt), ("f:3", GOOD), ("f:4", GOOD)])
    assert len({row.prompt_id for row in rows}) == 1
    assert len({row.pair_id for row in rows}) == 4
    assert [row.pair_id for row in rows[2:]] == [f"{rows[0].pair_id}-2", f"{rows[0].pair_id}-3"]
    bob = parse_row(record(user_id="bob"), "f:1")
    assert bob.prompt_id == rows[0].prompt_id
    assert bob.pair_id != rows[0].pair_id


@pytest.mark.slow
def test_derived_ids_are_the_same_in_another_process() -> None:
    code = (
        "from plrhf.data.parsing import parse_row;"
        f"row = parse_row({GOOD!r}, 'f:1'); print(row.prompt_id, row.pair_id)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = parse_row(GOOD, "elsewhere:9")
    assert out.stdout.split() == [here.prompt_id, here.pair_id]


@pytest.mark.parametrize(("n_characters", "fits"), [(499_800, True), (499_990, False)])
def test_a_chat_is_as_large_as_its_json(n_characters: int, fits: bool) -> None:
    prompt = [{"role": "user", "content": "a" * n_characters}]
    raw = {"prompt": prompt, "chosen": "Yes.", "rejected": "No.", "user_id": "u"}
    if fits:
        assert parse_row(raw, "here").prompt == tuple(prompt)
    else:
        with pytest.raises(RefusedRow) as error:
            parse_row(raw, "here")
        assert error.value.reason is Reason.TOO_LARGE


def test_rows_larger_than_the_limit_are_refused() -> None:
    text = "long " * 40
    records = [("f:1", record(chosen=text)), ("f:2", record(chosen="brief"))]
    rows, report = read_rows(records, max_row_bytes=150)
    assert len(rows) == 1 and report.refused == {Reason.TOO_LARGE: 1}
    example = report.examples[Reason.TOO_LARGE]
    assert example.startswith("f:1: row=") and "at most 150 bytes" in example
    assert "data.max_row_bytes" in example
    assert len(read_rows(records, max_row_bytes=1000)[0]) == 2


def test_people_who_withdrew_are_left_out_and_not_named(tmp_path: Path) -> None:
    path = tmp_path / "withdrew.txt"
    path.write_text("\ufeffann smith\r\n\nnobody here\n", encoding="utf-8")
    records = [
        (f"f:{n}", record(user_id=user)) for n, user in enumerate(["ann smith", "bo", "ann"])
    ]
    for on_bad_row in ("refuse", "error"):  # nothing is wrong with these rows
        rows, report = read_rows(records, on_bad_row=on_bad_row, without=read_ids(str(path)))
        assert [row.user_id for row in rows] == ["bo", "ann"]
        assert report.refused == {Reason.LEFT_OUT: 1} and report.read == 3
        assert report.examples[Reason.LEFT_OUT] == "f:0: user in data.without_users"
    assert read_ids(None) == frozenset()
    path.write_bytes(b"ann\xff")
    for wrong in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="^data.without_users='.*one user id a line"):
            read_ids(str(wrong))
