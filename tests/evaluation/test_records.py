"""Files of runs: damaged ones are named in one line, and lines end by a line feed alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plrhf.data.rows import Row
from plrhf.evaluation.generations import GeneratedText, read_generations
from plrhf.evaluation.records import read_record, write_text
from plrhf.evaluation.results import pairs_hash, read_results
from plrhf.evaluation.users import LearnedUsers

TEXT = {
    **{"prompt": "On\u2028rain\u0085", "prompt_id": "p", "user_id": "ann", "profile": None},
    **{"user_features": None, "writer": "policy", "response": "a\u2028b", "score": None},
}


def test_line_separators_within_texts_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    path.write_text(json.dumps(TEXT, ensure_ascii=False) + "\n", encoding="utf-8")
    (found,) = read_generations(path)
    assert isinstance(found, GeneratedText)
    assert (found.prompt, found.response) == (TEXT["prompt"], TEXT["response"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"schema": 2, "n_users": 1}',
            "users.json schema=2 is not allowed: expected 1. Write users.json anew.",
        ),
        (
            '{"schema": 1}',
            "users.json n_users=None is not allowed: expected a value, as the key is missing. "
            "Write users.json anew.",
        ),
    ],
)
def test_a_damaged_file_is_named_with_its_key(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "users.json"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        read_record(path, LearnedUsers)
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_half_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"schema": 1, "config": {')
    with pytest.raises(ValueError, match=r"results\.json='.*' is not allowed: .*EOF") as caught:
        read_results(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_hash_of_pairs_is_of_their_content_and_not_their_order() -> None:
    def pair(user: str, chosen: str, pair_id: str) -> Row:
        return Row("p", chosen, "r", user, prompt_id="p", pair_id=pair_id)

    one, two = pair("ann", "a", "1"), pair("bob", "b", "2")
    assert pairs_hash([one, two]) == pairs_hash([two, one])
    for other in (pair("ann", "other text", "1"), pair("cid", "a", "1"), pair("ann", "a", "3")):
        assert pairs_hash([other, two]) != pairs_hash([one, two])


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "adapt.json"
    write_text(path, json.dumps([1]))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plrhf.core.files.os.replace", full)
    with pytest.raises(OSError):
        write_text(path, json.dumps([2]))
    assert path.read_text() == "[1]" and list(tmp_path.iterdir()) == [path]
