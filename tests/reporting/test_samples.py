"""Texts beside each other: who stands where, and the bars of what was measured."""

from __future__ import annotations

from typing import Any

from plrhf.evaluation.generations import GeneratedText
from plrhf.reporting.samples import bars, cards, prompt_text, quality_table


def text(user: str, writer: str, **known: Any) -> GeneratedText:
    fields: dict[str, Any] = {"prompt": "Why?", "prompt_id": "why", "profile": "Terse."}
    fields |= {"user_features": None, "response": f"{writer} for {user}", "score": 0.256}
    fields |= {"style": {"length": -1.5, "lists": 0.5}, "taste": {"length": -2.0, "lists": -0.1}}
    return GeneratedText(**{**fields, "user_id": user, "writer": writer, **known})


def test_people_stand_before_the_generic_user_and_the_untouched_model() -> None:
    texts = [text(user, writer) for writer in ("policy", "generic", "reference") for user in "ab"]
    found = cards(texts)
    titles = [card["user_id"] for card in found]
    assert titles == ["a", "b", "nobody in particular", "the untouched model"]
    assert [card["response"] for card in found][1:3] == ["policy for b", "generic for a"]
    assert found[0]["score"] == "score 0.26" and found[3]["score"] == "scores: a 0.26, b 0.26"
    assert found[0]["profile"] == "Terse." and found[2]["profile"] is None
    assert {bar["kind"] for bar in found[2]["bars"]} == {"other"}


def test_a_bar_is_coloured_by_whether_the_person_likes_it() -> None:
    """Width is half the track for 3 standard deviations; weak preferences colour nothing."""
    style = {"length": -1.5, "lists": 3.0, "hedging": 0.6, "questions": 0.0}
    taste = {"length": -2.0, "lists": -1.0, "hedging": 0.7, "questions": 1.5}
    found = bars(style, taste)
    assert [bar["kind"] for bar in found] == ["liked", "disliked", "other", "other"]
    assert [bar["arrow"] for bar in found] == ["↓", "↓", "", "↑"]
    assert [(bar["left"], bar["width"]) for bar in found[:3]] == [
        ("25.0", "25.0"),
        ("50.0", "50.0"),
        ("50.0", "10.0"),
    ]
    assert [bar["value"] for bar in found] == ["-1.5", "+3.0", "+0.6", "+0.0"]
    assert {bar["kind"] for bar in bars(style, None)} == {"other"}


def test_writers_are_compared_where_something_is_known() -> None:
    nothing = {"score": None, "style": None, "taste": None}
    assert quality_table([text("a", "policy", **nothing)]) is None
    table = quality_table([text("a", "policy", reference_logp=-1.5), text("a", "reference")])
    assert table is not None
    (_, rows), *_ = table.groups
    assert [row[0].value for row in rows] == ["the policy", "the untouched model"]
    assert [row[4].value for row in rows] == ["-1.50", "–"]


def test_a_chat_of_one_turn_is_shown_as_the_question() -> None:
    turn = {"role": "user", "content": "Why so?"}
    assert prompt_text([turn]) == "Why so?"
    assert prompt_text([{"role": "system", "content": "Be kind."}, turn]) == (
        "system: Be kind.\nuser: Why so?"
    )
