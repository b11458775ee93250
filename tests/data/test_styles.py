"""The world of styles on a few texts written by hand: attributes, users, splits, and the judge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plrhf.data.parsing import parse_row
from plrhf.data.sources.styles import FARTHEST, StylesSource
from plrhf.data.style_attributes import ATTRIBUTES, measure
from plrhf.data.style_prompts import STYLES, all_prompts
from plrhf.data.style_texts import (
    StyleText,
    append_texts,
    fault_of,
    finished_part,
    read_texts,
)

KINDS = ("individual", "clusters", "features")

SAMPLE = Path(__file__).parent / "cases/styles.jsonl"
SMALL: dict[str, Any] = {"n_users": 7, "n_unseen_users": 3, "pairs_per_user": 11}


def world(**settings: Any) -> StylesSource:
    return StylesSource(path=str(SAMPLE), **{"kind": "individual", **SMALL, **settings})


def text(response: str, **fields: Any) -> StyleText:
    given = {"prompt_id": "a-0", "topic": "a", "prompt": "Why so?", "style": "short", "seed": 0}
    return StyleText(**{**given, "response": response, **fields})


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", {}),
        ("... !?", {}),
        # 7 words in 2 sentences, 1 + 4 + 3 + 4 + 5 + 3 + 3 letters
        (
            "I like the warm water. You too!",
            {
                **{"length": math.log(8), "sentence length": math.log(4.5), "exclamations": 0.5},
                **{"first person": 1 / 7, "second person": 1 / 7, "word length": 23 / 7},
                "variety": 1.0,
            },
        ),
        # 2 items, 6 words in 2 lines, "maybe" and "might" of them, "salt" twice
        (
            "- Maybe salt, salt\n- it might do",
            {
                **{"length": math.log(7), "sentence length": math.log(4), "lists": math.log(3)},
                **{"hedging": 2 / 6, "word length": 22 / 6, "variety": 5 / 6},
            },
        ),
        (
            "Why? Why!! I'm",
            {
                **{"length": math.log(4), "sentence length": math.log(2), "exclamations": 2 / 3},
                **{"questions": 1 / 3, "first person": 1 / 3, "word length": 3.0},
                "variety": 2 / 3,
            },
        ),
    ],
)
def test_attributes_by_hand(written: str, expected: dict[str, float]) -> None:
    found = dict(zip(ATTRIBUTES, measure(written), strict=True))
    assert found == pytest.approx({**dict.fromkeys(ATTRIBUTES, 0.0), **expected})


def test_variety_is_a_mean_over_windows() -> None:
    """26 words of which the first and the last are the same: one window has 25, the other too."""
    words = [f"w{chr(97 + n)}" for n in range(25)]
    at = ATTRIBUTES.index("variety")
    assert measure(" ".join([*words, words[0]]))[at] == 1.0
    assert measure(" ".join([*words, words[24]]))[at] == pytest.approx((25 + 24) / 50)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_splits_and_users(kind: str) -> None:
    source = world(kind=kind, val_pairs_per_user=2, test_pairs_per_user=5)
    rows = [parse_row(raw, where) for where, raw in source.records()]
    by_split = {name: [r for r in rows if r.split == name] for name in ("train", "val", "test")}
    sizes = {name: len(part) for name, part in by_split.items()}
    assert sizes == {"train": 77, "val": 14, "test": 50}
    topic = {one.prompt_id: one.topic for one in read_texts(SAMPLE)}
    parts = [{topic[row.prompt_id] for row in part} for part in by_split.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 5
    assert {row.user_id for row in by_split["test"]} == set(source.user_ids)
    assert {row.user_id for row in by_split["train"]} == set(source.user_ids[:7])
    assert all(len(row.prompt) == 1 and row.chosen != row.rejected for row in rows)
    assert all("Flour - Flour" not in row.chosen + row.rejected for row in rows)  # was dropped
    again = world(kind=kind, val_pairs_per_user=2, test_pairs_per_user=5)
    assert list(again.records()) == list(source.records())
    assert list(world(kind=kind, seed=1).records()) != list(source.records())


def test_prompts_are_turns_of_a_chat_or_plain_text() -> None:
    def prompt(**settings: Any) -> Any:
        return next(iter(world(**settings).records()))[1]["prompt"]

    plain = prompt(chat=False)
    turn = {"role": "user", "content": plain}
    assert isinstance(plain, str) and prompt() == [turn]
    assert prompt(system="Be brief.") == [{"role": "system", "content": "Be brief."}, turn]


def test_styles_are_standardised_over_the_texts_and_bounded() -> None:
    source = world()
    kept = [one.response for one in read_texts(SAMPLE) if one.dropped is None]
    raw = np.array([measure(one) for one in kept])
    expected = ((raw - raw.mean(axis=0)) / raw.std(axis=0)).clip(-3, 3)
    assert np.allclose([source.style(one) for one in kept], expected)
    shouting = dict(zip(ATTRIBUTES, source.style("Yes! " * 500), strict=True))
    assert shouting["length"] == FARTHEST and shouting["variety"] == -FARTHEST


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_is_judged_by_the_preferences_that_made_the_choices(kind: str) -> None:
    source = world(kind=kind)
    margins = source.oracle_margins()
    for _, row in source.records():
        user = row["user_id"]
        scores = [source.true_score(user, row[side]) for side in ("chosen", "rejected")]
        assert margins[row["pair_id"]] == pytest.approx(scores[0] - scores[1])
        by_hand = np.dot(source.true_vector(user), source.style(row["chosen"]))
        assert scores[0] == pytest.approx(float(by_hand))
    assert min(margins.values()) < 0 < max(margins.values())


@pytest.mark.slow
def test_choices_follow_bradley_terry() -> None:
    margins = np.array(list(world(pairs_per_user=800, scale=0.7).oracle_margins().values()))
    for low, high in ((0, 0.5), (0.5, 1), (1, 2), (2, 4)):
        near = (np.abs(margins) > low) & (np.abs(margins) <= high)
        expected = np.mean(1 / (1 + np.exp(-np.abs(margins[near]))))
        error = math.sqrt(expected * (1 - expected) / near.sum())
        assert near.sum() > 300 and abs(np.mean(margins[near] > 0) - expected) < 4 * error


def test_another_file_of_texts_is_another_world(tmp_path: Path) -> None:
    lines = SAMPLE.read_text().splitlines(keepends=True)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(lines[2:]))
    one, other = world(), StylesSource(path=str(fewer), kind="individual", **SMALL)
    assert one.world() != other.world() and one.world() == world().world()
    assert one.true_vector("ada-000") == other.true_vector("ada-000")
    assert one.profile("ada-000").startswith("Prefers ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"data\.path='.* is not allowed: expected a file of texts\. Make it: python -m"),
        ("", r"data\.path='.* is not allowed: expected .* prompts of 3 topics \(has 0\)"),
        ('{"prompt_id": "a"', r".*jsonl:1='json_invalid' is not allowed"),
        ('\n{"prompt_id": "a"}', r".*jsonl:2\.topic='missing' is not allowed"),
    ],
)
def test_files_that_hold_no_world(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"^{message}"):
        StylesSource(path=str(path), kind="individual")


def test_prompts_are_distinct_and_topics_come_first_once() -> None:
    prompts = all_prompts()
    n_topics = len({prompt.topic for prompt in prompts})
    assert len(prompts) == len({p.prompt_id for p in prompts}) == len({p.text for p in prompts})
    assert len({prompt.topic for prompt in prompts[:n_topics]}) == n_topics
    assert len(prompts) >= 300 and len(STYLES) >= 8


@pytest.mark.parametrize(
    ("written", "ended", "expected"),
    [
        (" All of it", True, ("All of it", None)),
        ("Yes. It is (very!) warm. And th", False, ("Yes. It is (very!) warm.", None)),
        ("- milk\n- eggs\n- bu", False, ("- milk\n- eggs", None)),
        ("No end at all, 3.5 of", False, ("No end at all, 3.5 of", "unfinished")),
    ],
)
def test_a_text_that_did_not_end_is_cut(
    written: str, ended: bool, expected: tuple[str, str | None]
) -> None:
    assert finished_part(written, ended=ended) == expected


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("Two words", "empty"),
        ("Soap lifts the fat, so water takes it away.", None),
        ("It is hot and it is hot and it is hot and dry", "repetitive"),
        ("Sure.\nUser: and why?", "not text alone"),
        ("It is <|im_end|> a text", "not text alone"),
        ("Небо синее и ясное", "not text alone"),
        ("Why so, why?", None),
        ("why   SO", "empty"),
        ("Old news, twice!", "duplicate"),
    ],
)
def test_degenerate_texts_have_a_reason(written: str, why: str | None) -> None:
    assert fault_of(text(written), {"old news twice"}) == why
    long = text("How do I bake bread?", prompt="How do I bake bread")
    assert fault_of(long, set()) == "copy of the prompt"


def test_a_line_cut_short_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    first, second = (
        text("It is warm today."),
        text("It is cold.", style="long", dropped="duplicate"),
    )
    append_texts(path, [first, second])
    whole = path.read_text()
    assert read_texts(path) == [first, second] and json.loads(whole.splitlines()[1])["seed"] == 0
    path.write_text(whole[:-9])
    assert read_texts(path, cut_short=True) == [first]
    append_texts(path, [second])
    assert path.read_text() == whole
