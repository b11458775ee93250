"""Descriptions of people from their train pairs, kept if they predict others, against a local endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import Answer, completion, serving, shown
from runs import composed, write_rows

from plrhf.cli.write_personas import write_personas
from plrhf.data.parsing import parse_row
from plrhf.data.rows import Row
from plrhf.evaluation.personas import NOBODY, PersonaWriter, best_of, divided


def row(user: str, number: int, *, longer: bool, split: str = "train", **more: Any) -> Any:
    """A choice between a long and a short answer."""
    answers = (f"a long and windy answer {number}", f"brief {number}")
    chosen, rejected = answers if longer else answers[::-1]
    own = {"chosen": chosen, "rejected": rejected, "user_id": user, "split": split}
    return {"prompt": f"Write {user} {number}.", "pair_id": f"{user}{number}", **own, **more}


def answer(body: dict[str, Any], before: int) -> Answer:
    """Describes everybody as a lover of long answers, and goes by what is said of the reader."""
    system, asked = (one["content"] for one in body["messages"])
    if system.startswith("You describe readers"):
        return completion(" Likes long answers. ", tokens=(50, 5))
    first, second = shown(body)
    if NOBODY in asked:
        return completion("TIE")
    return completion("A" if len(first) > len(second) else "B")


ROWS = [
    *(row("ada", n, longer=True, user_text="old") for n in range(8)),
    *(row("ben", n, longer=False) for n in range(8)),  # of whom the description is wrong
    row("cleo", 0, longer=True),  # too few to hold any out
    *(row(user, 90, longer=False, split="test") for user in ("ada", "ben", "zoe")),
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.mark.slow
def test_a_description_is_kept_if_it_predicts(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"

    def run() -> str:
        given = [f"data.path={rows}", f"out={out}", f"endpoint.url={server.url}"]
        more = ["endpoint.model=m", f"endpoint.cache={tmp_path / 'r'}", "endpoint.input_price=2"]
        priced = ["endpoint.output_price=1", "held_out=4", "hypotheses=2", "shown=3"]
        write_personas(composed(*given, *more, *priced, config="personas"))
        return capsys.readouterr().out

    with serving(answer) as server:
        said = run()
        n_sent = len(server.bodies)
        again = run()
        assert len(server.bodies) == n_sent  # all from the cache
    written = [json.loads(line) for line in out.read_text().splitlines()]
    texts = {one["user_id"]: one.get("user_text") for one in written}
    assert texts == {"ada": "Likes long answers.", "ben": None, "cleo": None, "zoe": None}
    own = ("prompt", "chosen", "rejected", "user_id", "split")
    key = "pair_id"
    assert {one[key]: [one[name] for name in own] for one in written} == {
        one[key]: [one[name] for name in own] for one in ROWS
    }
    assert "described: 1 of 3 users" in said
    assert "100.0% predicted, 50.0% without description" in said
    # Two users: two hypotheses each, of the same words, and four questions with and without these.
    assert n_sent == 2 * (2 + 4 + 4)
    price = (4 * 50 + 16 * 100) * 2 / 1e6 + (4 * 5 + 16 * 2) / 1e6
    assert f"endpoint: 20 questions, 0 answered before; 1800 + 52 tokens, price {price:.4f}" in said
    assert "endpoint: 20 questions, 20 answered before" in again
    # Nothing of test is shown, nor of what a description is tested on.
    described = [
        one["messages"][1]["content"] for one in server.bodies if one.get("max_tokens") == 300
    ]
    assert len(described) == 4 and all(" 90." not in one for one in described)


def test_what_is_shown_and_what_is_predicted_have_no_prompt_in_common() -> None:
    rows = [parse_row(row("ada", n, longer=True), "f:1") for n in range(5)]
    twice = [*rows, *(parse_row(row("ada", n, longer=False), "f:1") for n in range(5))]
    for own, held_out, n_tested in ((rows, 9, 2), (twice, 3, 3), (twice, 9, 5)):
        rest, tested = divided("ada", own, held_out=held_out, seed=3)
        assert len(tested) == n_tested and len(rest) > 0
        assert not {one.prompt_id for one in rest} & {one.prompt_id for one in tested}
    one_prompt: list[Row] = [parse_row({**ROWS[n], "prompt": "p"}, "f:1") for n in range(4)]
    rest, tested = divided("ada", one_prompt, held_out=2, seed=3)
    assert len(rest) == len(tested) == 2


def test_ties_go_to_nobody() -> None:
    assert best_of("ada", {NOBODY: 0.5, "a": 0.5}, 4).text is None
    found = best_of("ada", {NOBODY: 0.5, "a": 0.75, "b": 0.75}, 4)
    assert (found.text, found.accuracy, found.baseline) == ("a", 0.75, 0.5)


def test_errors_name_the_endpoints_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^endpoint\.url='ftp://x' is not allowed"):
        PersonaWriter(url="ftp://x", model="m", cache=tmp_path / "r", request={})
