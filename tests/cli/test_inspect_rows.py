"""What is said about a file of judgments before any training: right, or one clear line."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from runs import ENVIRONMENT, composed, world_tokenizer

from plrhf.cli.inspect_rows import DIVIDED, inspect_rows
from plrhf.cli.main import CONF, main
from plrhf.data.split_by import SplitBy, draw_splits

HEADER = ["prompt", "response_a", "response_b", "winner", "judge"]
ARENA = [
    [f"prompt {n % 20}", f"good {n}", f"bad {n}", "ab"[n % 2] if n % 5 else "tie", f"u{n % 3}"]
    for n in range(100)
]


def table(path: Path, lines: list[list[Any]], *, encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(lines)
    return path


def said(capsys: pytest.CaptureFixture[str], path: Path, *more: str) -> list[str]:
    inspect_rows(composed(f"data.path={path}", *more, config="inspect"))
    return capsys.readouterr().out.splitlines()


def test_an_arena(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, table(tmp_path / "arena.csv", [HEADER, *ARENA], encoding="utf-8-sig"))
    assert lines[:4] == [
        "records: 100, rows: 80",
        "read as comparisons",
        "refused: 20 of 100 records",
        f"  20 no response preferred, first {tmp_path}/arena.csv:2: verdict='tie' is not allowed: "
        "expected a choice. Set model.ties=shared, to learn from ties.",
    ]
    assert '  chosen: "bad 1"' in lines and '  user_id: "u1"' in lines
    assert "users: 3; pairs a user: 26 to 27, median 27" in lines
    assert "prompts: 16; pairs a prompt: 5 to 5, median 5" in lines
    # "good 1" is longer by one character than "bad 1"; a wins where n is even, n = 5, 10, ... are ties
    assert "the longer response is chosen in 50% of pairs" in lines
    assert "splits: drawn by data.split_by=prompt: no two have a prompt in common" in lines
    splits = [line for line in lines if line.startswith(("  train:", "  val:", "  test:"))]
    sizes = [[int(number) for number in re.findall(r"\d+", line)] for line in splits]
    assert sum(pairs for pairs, _, _ in sizes) == 80
    assert sum(prompts for _, _, prompts in sizes) == 16
    assert (
        lines[-2]
        == f"next: plrhf train experiment=quickstart data=jsonl data.path={tmp_path}/arena.csv"
    )


def test_lengths_in_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "model"
    world_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text("{}")
    long = [["prompt 1", "x " * 400, "y", "a", "u1"]]
    path = table(tmp_path / "arena.csv", [HEADER, *ARENA, *long])
    lines = said(capsys, path, f"backbone.path={directory}", "data.max_tokens=100")
    assert any(line.startswith("tokens, chosen: ") for line in lines)
    assert any(line.startswith("response too long: 1 of 81 rows (1%)") for line in lines)
    given = f"data.path={path} backbone=hf backbone.path={directory}"
    assert lines[-1] == f"next: plrhf train data=jsonl {given}"
    (directory / "config.json").write_text('{"model_type": "bert"}')
    lines = said(capsys, path, f"backbone.path={directory}")
    given = f"data.path={path} backbone.path={directory}"
    assert lines[-1] == f"next: plrhf train experiment=frozen_features {given}"


def test_one_prompt_and_one_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jokes = [["user", "joke", "rating"], *(["ann", f"Spaß\t{n}", n % 4] for n in range(12))]
    path = table(tmp_path / "jokes.csv", jokes)
    with pytest.raises(ValueError, match=r"set data\.split_by=pair or user"):
        said(capsys, path)
    lines = said(capsys, path, "data.split_by=user")
    shown = [line.split() for line in lines if line.startswith(("  chosen:", "  rejected:"))]
    assert len(shown) == 2 and all(re.fullmatch(r'"Spaß\\t\d+"', text) for _, text in shown)
    assert "  one user alone: nothing personal can be learned from others" in lines
    assert "splits: drawn by data.split_by=user: no two have a pair of one user in common" in lines
    assert (
        lines[-2]
        == f"next: plrhf train experiment=quickstart data=jsonl data.path={path} data.split_by=user"
    )


def test_rows_that_carry_splits_and_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "prompt": f"p{n}",
            "chosen": "a",
            "rejected": "b",
            "user_id": n % 4,
            "user_features": {"age": n % 4},
            "split": ["train", "val", "test"][n % 3],
        }
        for n in range(12)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = said(capsys, path)
    assert "splits: those that the rows carry" in lines and "user features: age" in lines
    assert "  train: pairs: 4, users: 4, prompts: 4" in lines


def test_latin_1_is_refused_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [["prompt", "chosen", "rejected", "user_id"]]
    lines += [[f"p{n}", "caf\xe9" if n == 3 else "tea", "no", f"u{n % 2}"] for n in range(30)]
    found = said(capsys, table(tmp_path / "rows.csv", lines, encoding="latin-1"))
    assert found[0] == "records: 30, rows: 29" and "  1 bad UTF-8, first" in found[2]


def test_no_user_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path / "t.csv", [["prompt", "chosen", "rejected"], ["p", "a", "b"]])
    with pytest.raises(ValueError, match=r"data.columns.user_id=COLUMN; the file has chosen, pr"):
        said(capsys, path)
    path = table(tmp_path / "a.csv", [HEADER[:4], ["p", "a", "b", "a"]])
    with pytest.raises(ValueError, match=r"user_id") as caught:
        said(capsys, path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_columns_are_mapped_by_the_words_that_the_error_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [["worker", "text", "offensiveness"]]
    lines += [[f"u{n % 3}", f"comment {n}", n % 5] for n in range(45)]
    path = table(tmp_path / "comments.csv", lines)

    def inspect(*words: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr("sys.argv", ["plrhf", f"data.path={path}", *words])
        status = 0
        try:
            main("inspect", "plrhf.cli.inspect_rows.inspect_rows")
        except SystemExit as ended:
            status = int(ended.code or 0)
        found = capsys.readouterr()
        return status, found.out.splitlines(), found.err

    status, _, error = inspect("data.columns.user_id=worker")
    assert status == 2 and error.endswith("one of ratings needs response and rating instead.\n")
    mapped = ["data.columns.user_id=worker", "data.columns.rating=offensiveness"]
    mapped += ["data.split_by=response"]
    status, found, error = inspect(*mapped)
    assert (status, error) == (0, "") and found[1] == "read as ratings"
    assert (
        "splits: drawn by data.split_by=response: each test pair has a response that "
        in "".join(found)
    )
    assert (
        found[-2]
        == f"next: plrhf train experiment=quickstart data=jsonl data.path={path} {' '.join(mapped)}"
    )


def rows_of(users: list[str], n: int = 60) -> list[dict[str, Any]]:
    """Rows of these users in turn, three for each of 20 prompts."""
    return [
        {
            "prompt": f"Q{place % 20}",
            "chosen": f"good {place}",
            "rejected": f"bad {place}",
            "user_id": users[place % len(users)],
        }
        for place in range(n)
    ]


def lines_of(path: Path, rows: list[dict[str, Any]], *, end: str = "\n") -> Path:
    path.write_bytes(b"".join(f"{json.dumps(row)}{end}".encode() for row in rows))
    return path


def test_ids_that_look_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users = ["Ann", "ann", "Jos\u00e9", "Jose\u0301", "bob", "b ob", "eve"]
    lines = said(capsys, lines_of(tmp_path / "r.jsonl", rows_of(users)))
    assert "users: 7; pairs a user: 8 to 9, median 9" in lines
    assert (
        "  6 ids differ in case, spaces or Unicode form alone, but count as users: 'Ann', 'ann'"
        in lines
    )


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_of_any_delimiter_and_line_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], delimiter: str, end: str
) -> None:
    path, rows = tmp_path / "rows.tsv", rows_of(["ann", "bob"])
    rows[1]["chosen"] = "one, two; three"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    lines = said(capsys, path)
    assert lines[0] == "records: 60, rows: 60"
    assert "users: 2; pairs a user: 30 to 30, median 30" in lines


VOTES = ["timestamp", "datetime", "comment-id", "voter-id", "vote"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("votes.csv", ",".join(VOTES) + "\n1,2,3,4,1\n", r"plrhf data convert polis DIR rows"),
        ("empty.csv", "", r"the file has none\.$"),
        ("empty.jsonl", "\n \n", r"rows='0 records'"),
        ("whole.json", json.dumps({"rows": [1], "n": 1}, indent=1), r"the object has rows, n\.$"),
        ("line.json", '{"data": [{"prompt": "a"}]}', r"those in data, write that list alone\.$"),
        ("one.jsonl", '{"text_a": 1}\n', r"data.columns.prompt=COLUMN; the row has text_a"),
    ],
)
def test_what_is_no_file_of_judgments_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        said(capsys, tmp_path / name)
    assert "\n" not in str(caught.value)


def test_each_way_to_divide_is_explained_wherever_they_are() -> None:
    ways = get_args(SplitBy)
    comment = next(
        line for line in (CONF / "data/base.yaml").read_text().splitlines() if "split_by:" in line
    )
    assert tuple(DIVIDED) == ways
    for way in ways:
        assert f"``{way}``: " in str(draw_splits.__doc__)
        assert f"{way}: " in comment or way == "prompt"  # the default, without its name


@pytest.mark.slow
def test_looking_at_rows_waits_for_no_model_library() -> None:
    slow = {"lightning", "transformers", "peft", "torchmetrics", "matplotlib", "datasets"}
    code = f"import sys, plrhf.cli.inspect_rows; print({slow} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT)
    assert done.stdout == b"set()\n"
