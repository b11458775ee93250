"""Files in the exact format of the paper's datasets: their names, columns, types and nesting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
from pyarrow import parquet

from plrhf.data.sources.psoups import PREFERENCES

COMPARISONS = arrow.schema(
    [
        (
            "info",
            arrow.struct(
                [(name, arrow.string()) for name in ("id", "post", "title", "subreddit")]
                + [("site", arrow.string()), ("article", arrow.string())]
            ),
        ),
        (
            "summaries",
            arrow.list_(
                arrow.struct([(name, arrow.string()) for name in ("text", "policy", "note")])
            ),
        ),
        ("choice", arrow.int32()),
        ("worker", arrow.string()),
        ("batch", arrow.string()),
        ("split", arrow.string()),
        ("extra", arrow.struct([("confidence", arrow.int32())])),
    ]
)
"""The columns of the hub's parquet files of openai/summarize_from_feedback, comparisons."""


def comparison(
    worker: str | None,
    texts: tuple[Any, Any] = (" A long summary.", " Short."),
    *,
    choice: int | None = 0,
    split: str = "train",
    post: Any = "My cat hides.",
    policies: tuple[str, str] = ("sup4", "sup2"),
) -> dict[str, Any]:
    """A line of OpenAI's comparisons."""
    return {
        "info": {"id": "t3_1", "post": post, "title": "Cat", "subreddit": "pets"},
        "summaries": [
            {"text": text, "policy": policy, "note": None}
            for text, policy in zip(texts, policies, strict=True)
        ],
        "choice": choice,
        "worker": worker,
        "batch": "batch7",
        "split": split,
        "extra": {"confidence": 8},
    }


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def write_comparisons(folder: Path, records: list[dict[str, Any]]) -> Path:
    """The hub's layout: comparisons/{train,validation}/0000.parquet."""
    for name in ("train", "validation"):
        part = [one for one in records if (one["split"] == "train") == (name == "train")]
        path = folder / "comparisons" / name / "0000.parquet"
        path.parent.mkdir(parents=True)
        parquet.write_table(arrow.Table.from_pylist(part, schema=COMPARISONS), path)
    return folder


def many_comparisons() -> list[dict[str, Any]]:
    """Four workers with 9, 7, 5 and 2 train rows on posts of their own, and 3 test rows each."""
    sizes = {"ann": 9, "bob": 7, "cid": 5, "dot": 2}
    records = []
    for worker, size in sizes.items():
        for number in range(size + 3):
            split = "train" if number < size else "valid1" if number == size else "valid2"
            texts = (f" {worker} saw {number} cats at sea.", " No cats." if number % 2 else " Ok.")
            post = f"Post {number} of {worker} on cats."
            records.append(comparison(worker, texts, choice=number % 2, split=split, post=post))
    return records


def judgment(user: str, question: str, chosen: Any, rejected: Any) -> dict[str, Any]:
    """An entry of Personalized Soups' rm_training files."""
    asked = f"{question} {PREFERENCES[user]}"
    return {"user_input": asked, "completion_a": chosen, "completion_b": rejected}


def write_soups(folder: Path, extra: dict[str, list[Any]] | None = None) -> Path:
    """rm_training with one JSON list a user: 10 questions each, and `extra` entries."""
    rm_training = folder / "rm_training"
    rm_training.mkdir(parents=True)
    for user in PREFERENCES:
        entries = [
            judgment(user, f"What is {number}?", f"{user} says {number}.", f"Not {number}.")
            for number in range(10)
        ]
        entries += (extra or {}).get(user, [])
        (rm_training / f"{user}.json").write_text(json.dumps(entries))
    return folder


def person(user_id: str, **changes: Any) -> dict[str, Any]:
    """A line of PRISM's survey."""
    stated = {"values": 52, "creativity": 61, "fluency": 90, "factuality": 100}
    stated |= {"diversity": 60, "safety": 90, "personalisation": 50, "helpfulness": 100}
    return {
        "user_id": user_id,
        "survey_only": False,
        "num_completed_conversations": 6,
        "consent": "Yes, I consent to take part",
        "consent_age": "I certify that I am 18 years of age or over",
        "lm_familiarity": "Somewhat familiar",
        "lm_indirect_use": "Yes",
        "lm_direct_use": "Yes",
        "lm_frequency_use": "Once per month",
        "self_description": "I value honesty. ",
        "system_string": "You are a loyal friend.",
        "age": "18-24 years old",
        "gender": "Female",
        "employment_status": "Working full-time",
        "education": "Vocational",
        "marital_status": "Never been married",
        "english_proficiency": "Fluent",
        "study_id": "p1",
        "study_locale": "us",
        "religion": {"self_described": "none", "categorised": "Non-religious"},
        "ethnicity": {"self_described": "white", "categorised": "White"},
        "location": {"birth_country": "France", "special_region": "Europe"},
        "lm_usecases": {"homework_assistance": 0, "other_text": None},
        "stated_prefs": {**stated, "other": None, "other_text": None},
        "order_lm_usecases": {"homework_assistance": 1, "other": 2},
        "order_stated_prefs": {"values": 5, "creativity": 1, "other": 9},
        "generated_datetime": "2023-11-22 16:23:19",
        "timing_duration_s": 583,
        "timing_duration_mins": 9.72,
        "included_in_US_REP": False,
        "included_in_UK_REP": False,
        "included_in_balanced_subset": True,
        **changes,
    }


def asked(turn: int, content: Any) -> dict[str, Any]:
    """What a user wrote in a conversation_history."""
    return {"turn": turn, "role": "user", "content": content}


def reply(turn: int, content: Any, *, chosen: bool = False, place: int = 0) -> dict[str, Any]:
    """What a model wrote in a conversation_history."""
    return {
        "turn": turn,
        "role": "model",
        "content": content,
        "model_provider": "cohere",
        "model_name": "command",
        "score": 80 if chosen else 20,
        "if_chosen": chosen,
        "within_turn_id": place,
    }


def _turn(turn: int, name: str) -> list[dict[str, Any]]:
    """A question, a chosen and a rejected reply."""
    replies = [reply(turn, "Of the sea.", chosen=True), reply(turn, f"No, {name}.", place=1)]
    return [asked(turn, f"Tell {name}."), *replies]


def conversation(
    conversation_id: str, user_id: Any, history: Any = None, **changes: Any
) -> dict[str, Any]:
    """A line of PRISM's conversations; without a history one turn of one chosen, one rejected."""
    history = _turn(0, conversation_id) if history is None else history
    return {
        "conversation_id": conversation_id,
        "user_id": user_id,
        "included_in_balanced_subset": True,
        "conversation_type": "unguided",
        "opening_prompt": history[0]["content"] if isinstance(history, list) else "",
        "conversation_turns": 1,
        "conversation_history": history,
        "performance_attributes": {"values": 76, "safety": None},
        "choice_attributes": {"values": 54, "safety": None},
        "open_feedback": "Fine.",
        "generated_datetime": "2023-11-22 16:30:00",
        "timing_duration_s": 100.5,
        "timing_duration_mins": 1.67,
        **changes,
    }


def write_prism(folder: Path, people: list[Any], conversations: list[Any]) -> Path:
    """survey.jsonl and conversations.jsonl in a folder."""
    write_lines(folder / "survey.jsonl", people)
    write_lines(folder / "conversations.jsonl", conversations)
    return folder


def many_dialogues(
    n_users: int = 8, n_dialogues: int = 5, n_turns: int = 1
) -> tuple[list[Any], list[Any]]:
    """People of three ages, and their dialogues of so many turns, with a rejected reply each."""
    ages = ("18-24 years old", "25-34 years old", "65+ years old")
    people = [person(f"user{number}", age=ages[number % 3]) for number in range(n_users)]
    return people, [
        conversation(
            name, one["user_id"], [entry for n in range(n_turns) for entry in _turn(n, name)]
        )
        for number, one in enumerate(people)
        for name in (f"c{number * n_dialogues + place}" for place in range(n_dialogues))
    ]
