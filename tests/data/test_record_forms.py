"""Forms in which judgments are published: each is recognised and read as a person would."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from plrhf.data.reading import read_rows
from plrhf.data.sources.jsonl import JsonlSource


def read(path: Path, **options: Any) -> tuple[list[tuple[Any, ...]], dict[str, int], str | None]:
    source = JsonlSource(path=str(path), **options)
    rows, report = read_rows(source.records())
    found = [(row.prompt, row.chosen, row.rejected, row.user_id) for row in rows]
    assert report.read == len(found) + sum(report.refused.values())
    return found, dict(report.refused), source.form


def write_csv(path: Path, lines: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


def write_json(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


def test_an_arena_with_ties(tmp_path: Path) -> None:
    header = ["prompt", "response_a", "response_b", "winner", "judge", "turn"]
    lines = [
        ["Hi?", "Hello", "Go away", "model_a", "ann", 1],
        ["Hi?", "Hello", "Go away", "model_b", "bob", 1],
        ["Bye?", "x", "y", "tie (bothbad)", "ann", 1],
        ["Bye?", "x", "y", "tie", "bob", 1],
        ["Bye?", "x", "y", "", "bob", 1],
        ["Bye?", "x", "y", "gpt", "bob", 1],
    ]
    rows, refused, form = read(write_csv(tmp_path / "arena.csv", [header, *lines]))
    assert rows == [("Hi?", "Hello", "Go away", "ann"), ("Hi?", "Go away", "Hello", "bob")]
    assert refused == {"no response preferred": 2, "record unlike the dataset's": 2}
    assert form == "comparisons"


def test_an_arena_of_conversations(tmp_path: Path) -> None:
    def talk(reply: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": reply}]

    record = {"question_id": "q1", "model_a": "m", "model_b": "n", "winner": "model_b"}
    record |= {"judge": "arena_user_3", "conversation_a": talk("no"), "conversation_b": talk("yes")}
    by_name = {**record, "winner": "m", "judge": 7}
    rows, refused, _ = read(write_json(tmp_path / "arena.json", [record, by_name]))
    prompt = ({"role": "user", "content": "Hi?"},)
    assert rows == [(prompt, "yes", "no", "arena_user_3"), (prompt, "no", "yes", "7")]
    assert refused == {}


def test_a_table_with_a_column_for_each_winner(tmp_path: Path) -> None:
    header = [
        "prompt",
        "response_a",
        "response_b",
        "winner_model_a",
        "winner_model_b",
        "winner_tie",
    ]
    lines = [['["Hi?"]', '["A"]', '["B"]', 0, 1, 0], ['["Hi?"]', '["A"]', '["B"]', 0, 0, 1]]
    path = write_csv(tmp_path / "t.csv", [[*header, "user_id"], *([*one, "u"] for one in lines)])
    assert read(path)[:2] == ([("Hi?", "B", "A", "u")], {"no response preferred": 1})


@pytest.mark.parametrize(
    ("columns", "value", "won"),
    [
        (("answer1", "answer2"), "1", 0),
        (("answer1", "answer2"), "answer2", 1),
        (("answer 0", "answer 1"), "1", 1),
        (("left_response", "right_response"), "Right", 1),
        (("Text A", "Text B"), "A", 0),
        (("output_1", "output_2"), "2.0", 1),
    ],
)
def test_names_of_sides(tmp_path: Path, columns: tuple[str, str], value: str, won: int) -> None:
    header = ["question", *columns, "choice", "worker"]
    rows, refused, _ = read(write_csv(tmp_path / "t.csv", [header, ["q", "x", "y", value, "w"]]))
    assert (rows, refused) == ([("q", *(("x", "y") if won == 0 else ("y", "x")), "w")], {})


def test_ratings_are_paired_within_user_and_prompt(tmp_path: Path) -> None:
    header = ["user", "prompt", "response", "rating"]
    lines = [
        ["ann", "p", "a", 3],
        ["ann", "p", "b", 5],
        ["ann", "p", "c", 3],
        ["bob", "p", "a", 4],
        ["bob", "q", "d", 1],
        ["bob", "q", "e", "n/a"],
        ["bob", "q", "f", 1.5],
    ]
    rows, refused, form = read(write_csv(tmp_path / "ratings.csv", [header, *lines]))
    assert rows == [("p", "b", "a", "ann"), ("p", "b", "c", "ann"), ("q", "f", "d", "bob")]
    assert refused == {"rating in no pair": 1, "record unlike the dataset's": 1}
    assert form == "ratings"


@pytest.mark.parametrize("name", ["userId", "User ID", "WORKER-ID", "username"])
def test_a_user_column_is_found_however_it_is_spelt(tmp_path: Path, name: str) -> None:
    lines = [[name, "title", "rating"], ["7", "a", 2], ["7", "b", 4.5]]
    path = write_csv(tmp_path / "ratings.csv", lines)
    assert [one[1:] for one in read(path)[0]] == [("b", "a", "7")]


def test_an_error_names_what_is_wrong_and_not_what_is_left_out_by_rule(tmp_path: Path) -> None:
    lines = [["title", "rating"], ["a", 2], ["b", 4.5], *([f"c{n}", 2] for n in range(100))]
    source = JsonlSource(path=str(write_csv(tmp_path / "ratings.csv", lines)))
    _, report = read_rows(source.records())
    with pytest.raises(ValueError, match=r"Mend what the first one names: .*user_id=None"):
        report.check_some_left()


def test_thumbs_up_and_down(tmp_path: Path) -> None:
    records = [
        {"prompt": "p", "completion": "a", "label": True, "user_id": "u"},
        {"prompt": "p", "completion": "b", "label": False, "user_id": "u"},
        {"prompt": "q", "completion": "c", "label": True, "user_id": "u"},
    ]
    assert read(write_json(tmp_path / "kto.json", records))[:2] == (
        [("p", "a", "b", "u")],
        {"rating in no pair": 1},
    )


def test_thumbs_of_conversations(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "p"}]
    records = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": text}], "label": good}
        for text, good in (("a", True), ("b", False))
    ]
    path = write_json(tmp_path / "kto.json", [{**one, "user_id": "u"} for one in records])
    rows, refused, _ = read(path)
    assert rows == [((prompt[0],), "a", "b", "u")] and refused == {}


def test_many_ratings_of_one_user_give_a_bounded_number_of_pairs(tmp_path: Path) -> None:
    lines = [["u", f"joke {n}", n] for n in range(20)]
    path = write_csv(tmp_path / "jokes.csv", [["user", "joke", "rating"], *lines])
    rows, refused, _ = read(path)
    assert len(rows) == 30 and all(int(one[1][5:]) > int(one[2][5:]) for one in rows)
    texts = {text for row in rows for text in row[1:3]}
    assert sum(refused.values()) == 20 - len(texts)
    assert read(path)[0] == rows


def annotation(user: Any, value: dict[str, Any], kind: str = "pairwise", **more: Any) -> Any:
    result = [{"from_name": "pw", "to_name": "t1,t2", "type": kind, "value": value}]
    return {"completed_by": user, "result": result, "was_cancelled": False, **more}


def test_label_studio(tmp_path: Path) -> None:
    tasks = [
        {
            "id": 1,
            "data": {"prompt": "p", "text1": "a", "text2": "b"},
            "annotations": [
                annotation(3, {"selected": "left"}),
                annotation({"id": 4, "email": "x@y.z"}, {"selected": "right"}),
                annotation(5, {"selected": "left"}, was_cancelled=True),
                {"completed_by": 6, "result": []},
            ],
        },
        {
            "id": 2,
            "data": {"context": "p2", "first": "a", "last": "b"},
            "annotations": [annotation(3, {"choices": ["Response 2"]}, "choices")],
        },
        {"id": 3, "data": {"prompt": "p", "text1": "a", "text2": "b"}, "annotations": []},
    ]
    rows, refused, form = read(write_json(tmp_path / "export.json", tasks))
    assert rows == [("p", "a", "b", "3"), ("p", "b", "a", "4"), ("p2", "b", "a", "3")]
    assert refused == {"no response preferred": 3}
    assert form == "label_studio"


def test_minimal_label_studio(tmp_path: Path) -> None:
    """What JSON_MIN makes of the tags: Pairwise is a list, one choice and one comment are texts."""
    more = {"annotation_id": 7, "created_at": "", "updated_at": "", "lead_time": 1.5}
    data = {"prompt": "p", "text1": "a", "text2": "b", "id": 1}
    marks: list[dict[str, Any]] = [
        {"pw": [{"selected": "right"}], "note": "First of all, why?", "annotator": 3},
        {"pick": "Response 1", "annotator": 4},
        {"note": "Left me cold", "choice": "Response 2", "annotator": 4},
        {"note": "Left me cold", "pick": "Response 2", "annotator": 4},
        {"annotator": 5},
        {"stars": [{"rating": 3}], "annotator": 5},
    ]
    records = [{**data, **one, **more} for one in marks]
    rows, refused, form = read(write_json(tmp_path / "export.json", records))
    assert rows == [("p", "b", "a", "3"), ("p", "a", "b", "4"), ("p", "b", "a", "4")]
    assert refused == {"no response preferred": 2, "record unlike the dataset's": 1}
    assert form == "label_studio_minimal"


def test_label_studio_in_a_table(tmp_path: Path) -> None:
    """In CSV the marks are JSON, and those that the first annotation lacks stand last."""
    header = ["prompt", "text1", "text2", "id", "annotator", "annotation_id", "lead_time", "pw"]
    lines = [
        ["p", "a", "b", n, 3, n, 1.5, mark]
        for n, mark in enumerate(("", '[{"selected": "right"}]', '{"selected": "left"}'))
    ]
    rows, refused, form = read(write_csv(tmp_path / "export.csv", [header, *lines]))
    assert rows == [("p", "b", "a", "3"), ("p", "a", "b", "3")]
    assert refused == {"no response preferred": 1} and form == "label_studio_minimal"


def test_argilla(tmp_path: Path) -> None:
    fields = {"prompt": "p", "response1": "a", "response2": "b"}
    ranked = [{"value": "response2", "rank": 1}, {"value": "response1", "rank": 2}]
    level = [{"value": "response2", "rank": 1}, {"value": "response1", "rank": 1}]
    answers = [
        {"value": "response1", "user_id": "u1"},
        {"value": ["response2", "response1"], "user_id": "u2"},
        {"value": ranked, "user_id": "u3"},
        {"value": level, "user_id": "u4"},
    ]
    records = [
        {"id": "r", "fields": fields, "responses": {"preference": answers}, "suggestions": {}},
        {"id": "s", "fields": fields, "responses": {}, "suggestions": {}},
    ]
    rows, refused, form = read(write_json(tmp_path / "export.json", records))
    assert rows == [("p", "a", "b", "u1"), ("p", "b", "a", "u2"), ("p", "b", "a", "u3")]
    assert refused == {"no response preferred": 2}
    assert form == "argilla"


def test_columns_can_be_mapped_and_rows_are_rows(tmp_path: Path) -> None:
    header = ["task", "response_a", "response_b", "winner", "who"]
    path = write_csv(tmp_path / "t.csv", [header, ["p", "a", "b", "b", "u"]])
    assert read(path, columns={"prompt": "task", "user_id": "who"})[0] == [("p", "b", "a", "u")]
    columns = {"prompt": "task", "chosen": "response_a", "rejected": "response_b", "user_id": "who"}
    assert read(path, columns=columns)[::2] == ([("p", "a", "b", "u")], None)


def test_a_table_without_a_user_is_refused_row_by_row(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "t.csv", [["prompt", "response_a", "response_b", "winner"], ["p", "a", "b", "a"]]
    )
    assert read(path)[:2] == ([], {"missing field": 1})
