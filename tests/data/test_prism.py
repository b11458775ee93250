"""PRISM: pairs of a dialogue by hand, people as features and text, splits by user and dialogue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from pyarrow import parquet
from runs import check_run, launch, save_model
from transformers import AutoTokenizer
from upstream import asked, conversation, many_dialogues, person, reply, write_lines, write_prism

from plrhf.data.reading import ReadReport, read_rows
from plrhf.data.rows import Row
from plrhf.data.sources.prism import PrismSource
from plrhf.data.splits import is_unseen_user, split_rows

WHOLE = {"unseen_fraction": 0.0, "test_fraction": 0.0, "val_fraction": 0.0}

TWO_TURNS = [
    asked(0, "Is honey healthy?"),
    reply(0, "No idea.", place=0),
    reply(0, "In small amounts.", chosen=True, place=1),
    reply(0, "Yes!", place=2),
    asked(1, "How much?"),
    reply(1, "A spoon.", chosen=True, place=0),
    reply(1, "A jar.", place=1),
]


def read(path: Path, **settings: Any) -> tuple[list[Row], ReadReport]:
    return read_rows(PrismSource(path=str(path), **{**WHOLE, **settings}).records())


def of_history(folder: Path, history: Any) -> tuple[list[Row], ReadReport]:
    return read(write_prism(folder, [person("user0")], [conversation("c0", "user0", history)]))


def test_one_pair_for_each_rejected_reply_with_the_chosen_history(tmp_path: Path) -> None:
    rows, report = of_history(tmp_path, TWO_TURNS)
    first = ({"role": "user", "content": "Is honey healthy?"},)
    second = (
        *first,
        {"role": "assistant", "content": "In small amounts."},
        {"role": "user", "content": "How much?"},
    )
    assert [(row.prompt, row.chosen, row.rejected) for row in rows] == [
        (first, "In small amounts.", "No idea."),
        (first, "In small amounts.", "Yes!"),
        (second, "A spoon.", "A jar."),
    ]
    assert [row.pair_id for row in rows] == ["c0 0 0", "c0 0 2", "c0 1 1"]
    assert {row.conversation_id for row in rows} == {"c0"}
    assert {row.user_id for row in rows} == {"user0"} and report.refused == {}


def test_who_the_user_is(tmp_path: Path) -> None:
    (row, *_), _ = of_history(tmp_path, TWO_TURNS)
    assert row.user_text == (
        "About the user: I value honesty.\nWhat the user finds important in an answer, of 100: "
        "factuality 100, helpfulness 100, fluency 90, safety 90, creativity 61, diversity 60, "
        "values 52, personalisation 50."
    )
    assert row.user_features == {
        **{"age": "18-24 years old", "gender": "Female", "education": "Vocational"},
        **{"employment_status": "Working full-time", "marital_status": "Never been married"},
        **{"english_proficiency": "Fluent", "lm_familiarity": "Somewhat familiar"},
        **{"lm_frequency_use": "Once per month", "religion.categorised": "Non-religious"},
        **{"ethnicity.categorised": "White", "location.special_region": "Europe"},
        **{"stated_prefs.values": 52.0, "stated_prefs.creativity": 61.0},
        **{"stated_prefs.fluency": 90.0, "stated_prefs.factuality": 100.0},
        **{"stated_prefs.diversity": 60.0, "stated_prefs.safety": 90.0},
        **{"stated_prefs.personalisation": 50.0, "stated_prefs.helpfulness": 100.0},
    }


def test_gaps_in_the_survey_are_gaps_in_the_features(tmp_path: Path) -> None:
    nothing = {"self_description": "EMPTY STRING", "religion": None, "age": None}
    half = {"stated_prefs": {"values": None, "fluency": float("nan"), "safety": "much"}}
    people = [person("user0", **nothing, **half), person("user1", stated_prefs=None)]
    dialogues = [conversation(f"c{n}", f"user{n}") for n in range(2)]
    source = PrismSource(path=str(write_prism(tmp_path, people, dialogues)), **WHOLE)
    rows, report = read_rows(source.records())
    assert [row.user_text for row in rows] == [None, "About the user: I value honesty."]
    for row in rows:
        assert row.user_features is not None and "stated_prefs.values" not in row.user_features
    assert set(rows[1].user_features or {}) - set(rows[0].user_features or {}) == {
        *("age", "religion.categorised")
    }
    assert report.refused == {}
    assert source.profile("user1") == rows[1].user_text and source.profile("user9") is None


def changed(place: int, **changes: Any) -> list[dict[str, Any]]:
    return [{**one, **changes} if at == place else one for at, one in enumerate(TWO_TURNS)]


ODD: dict[str, tuple[Any, int, dict[str, int]]] = {
    "list for a rejected reply": (
        changed(1, content=["No idea."]),
        2,
        {"field that is not text": 1},
    ),
    "list for a chosen reply": (changed(2, content=["Some."]), 0, {"field that is not text": 3}),
    "blank rejected": (changed(3, content="EMPTY STRING"), 2, {"empty response": 1}),
    "tie": (changed(6, content="A spoon."), 2, {"chosen equal to rejected": 1}),
    "blank question": (changed(4, content="EMPTY STRING"), 2, {"empty prompt": 1}),
    # What was not asked cannot stand in a later turn's history either.
    "no question": (TWO_TURNS[1:], 0, {"empty prompt": 1, "missing field": 1}),
    "none chosen": (changed(2, if_chosen=False), 1, {"turn without chosen and rejected reply": 1}),
    "all chosen": (
        changed(6, if_chosen=True),
        2,
        {"turn without chosen and rejected reply": 1, "no response preferred": 1},
    ),
    "two chosen": (changed(3, if_chosen=True), 2, {"no response preferred": 1}),
    "no list": ("Is honey healthy?", 0, {"record unlike the dataset's": 1}),
    "no turn": (changed(1, turn=None), 0, {"record unlike the dataset's": 1}),
    "no role": (changed(1, role="tool"), 0, {"record unlike the dataset's": 1}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_dialogues_are_refused_by_reason(name: str, tmp_path: Path) -> None:
    history, n_rows, refused = ODD[name]
    rows, report = of_history(tmp_path, history)
    if name == "none chosen":  # the dialogue goes on without a reply, as in the authors' code
        assert [message["role"] for message in rows[0].prompt] == ["user", "user"]  # type: ignore[index]
    assert len(rows) == n_rows and report.refused == refused


def test_odd_people_are_refused_by_reason(tmp_path: Path) -> None:
    people = [
        person("user0"),
        person("user0", age="65+ years old"),
        person("user1", num_completed_conversations=0, survey_only=True),
        person("user2", age=["old"]),
        {**person("user3"), "user_id": None},
    ]
    users = ("user0", "user1", "user2", "stranger", None)
    dialogues = [conversation(f"c{place}", user) for place, user in enumerate(users)]
    path = write_prism(tmp_path, people, [*dialogues, conversation("c0", "user0")])
    (path / "survey.jsonl").open("a").write("{oops\n")
    rows, report = read(path)
    assert [(row.user_id, row.pair_id) for row in rows] == [("user0", "c0 0 1")]
    assert rows[0].user_features is not None
    assert rows[0].user_features["age"] == "18-24 years old"
    assert report.refused == {
        "record unlike the dataset's": 2,  # user0 again, and nobody
        "bad JSON": 1,
        "user without a finished conversation": 3,  # user1 with their dialogue, and the stranger
        "missing field": 1,
        "bad user features": 1,
        "duplicate pair id": 1,
    }


def test_splits_by_user_and_dialogue(tmp_path: Path) -> None:
    people, dialogues = many_dialogues(n_users=41, n_dialogues=7)
    people.append(person("single"))
    dialogues.append(conversation("alone", "single"))
    fractions = {"unseen_fraction": 0.2, "test_fraction": 0.3, "val_fraction": 0.25}
    rows, _ = read(write_prism(tmp_path, people, dialogues), seed=3, **fractions)
    by_user: dict[str, list[str | None]] = {}
    for row in rows:
        by_user.setdefault(row.user_id, []).append(row.split)
    assert by_user.pop("single") in (["test"], ["test"])
    unseen = {user for user in by_user if is_unseen_user(user, seed=3, unseen_fraction=0.2)}
    assert 2 <= len(unseen) <= 16  # 8.2 expected, deviation 2.6
    for user, names in by_user.items():
        n_test = 7 if user in unseen else 3  # int(7 * 0.7) = 4 are left to train on
        assert names.count("test") == n_test
        assert user in unseen or names.count("train") >= 1
    n_val = sum(names.count("val") for names in by_user.values())
    assert 10 <= n_val <= 45  # of 33 * 3, a quarter

    # The data module draws the same unseen users, so its own rule takes nobody else away.
    splits = split_rows(
        rows,
        seed=3,
        val_fraction=0.25,
        test_fraction=0.3,
        unseen_fraction=0.2,
        min_pairs_per_user=1,
        applied_by_source={"val_fraction", "test_fraction"},
    )
    assert set(splits.users) == by_user.keys() - unseen and splits.dropped == {}


def test_a_dialogue_is_in_one_split(tmp_path: Path) -> None:
    dialogues = [
        conversation(f"c{n}", f"user{n % 2}", [{**one} for one in TWO_TURNS]) for n in range(20)
    ]
    path = write_prism(tmp_path, [person("user0"), person("user1")], dialogues)
    rows, _ = read(path, test_fraction=0.4, val_fraction=0.3)
    of_dialogue: dict[str, set[str | None]] = {}
    for row in rows:
        of_dialogue.setdefault(row.pair_id.split()[0], set()).add(row.split)
    assert len(of_dialogue) == 20 and all(len(names) == 1 for names in of_dialogue.values())

    # All ask the same, so only what test has can stay.
    disjoint, report = read(path, test_fraction=0.4, val_fraction=0.3, protocol="disjoint")
    assert len(disjoint) == 8 * 3 and {row.split for row in disjoint} == {"test"}
    assert report.refused == {"prompt of a later split": 12 * 3}


def test_json_lists_and_parquet_and_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people, dialogues = many_dialogues(3, 2)
    expected, _ = read(write_prism(tmp_path / "lines", people, dialogues))
    for folder in ("lists", "tables"):
        (tmp_path / folder).mkdir()
    for name, records in (("survey", people), ("conversations", dialogues)):
        (tmp_path / f"lists/{name}.json").write_text(json.dumps(records))
        parquet.write_table(arrow.Table.from_pylist(records), tmp_path / f"tables/{name}.parquet")
    assert len(expected) == 6
    assert read(tmp_path / "lists")[0] == expected == read(tmp_path / "tables")[0]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path / "lines")
    assert read(Path("HannahRoseKirk/prism-alignment"))[0] == expected


def test_missing_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "survey.jsonl", [person("user0")])
    with pytest.raises(ValueError) as caught:
        read(tmp_path)
    assert str(caught.value) == (
        f"data.path='{tmp_path}' is not allowed: expected a directory with survey and "
        "conversations, and conversations is not there. Give the directory that holds both."
    )


@pytest.mark.slow
def test_a_run_on_features_and_dialogues(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(model)
    path = write_prism(tmp_path / "prism", *many_dialogues(8, 5, n_turns=3))
    launch(
        "train",
        *("data=prism", f"data.path={path}", "data.unseen_fraction=0.3", "data.batch_size=8"),
        *("data.max_prompt_tokens=60", "data.max_tokens=120", "data.val_fraction=0.2"),
        *("data.test_fraction=0.2", "backbone=hf", f"backbone.path={model}"),
        *("encoder=features", "trainer.max_epochs=1", "optim.warmup_steps=2"),
        "data.history_turns=2",
        f"run_dir={tmp_path / 'run'}",
    )
    results = check_run(tmp_path / "run", oracle=False)
    users = results["data"]["users"]
    assert users["seen"] + users["unseen"] == 8 and users["unseen"] >= 1
    assert results["test"]["seen"]["user"]["n_pairs"] == 3 * users["seen"]
    assert results["test"]["unseen"]["user"]["n_pairs"] == 15 * users["unseen"]
    truncated = results["data"]["truncated"]
    assert truncated["prompt truncated"] == 120  # by what users say of themselves
    assert truncated["earlier turns left out"] == 40  # of third turns, which have two before
