"""Own pairs as text in front of prompts: their form, whose they are, and what never stands there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pair_data import make_data
from test_chat import CHATML, USER, a_row, tagged  # noqa: F401
from test_own_pairs import records

from plrhf.data.in_context import InContextTokenizer, row_tokenizer, shares_text, show_pairs
from plrhf.data.own_pairs import TrainPairs
from plrhf.data.rows import Row

MOST = 3
OWN = [
    Row("Name a sea.", "Blue.", "Wide.", "ann", "one", "pair one"),
    Row(({"role": "user", "content": "And a hill?"},), "Far.", "Home.", "ann", "two", "pair two"),
]
SHOWN = (
    "# Example 1\n## Question\nName a sea.\n## Preferred\nBlue.\n## Dispreferred\nWide.\n"
    "# Example 2\n## Question\nAnd a hill?\n## Preferred\nFar.\n## Dispreferred\nHome.\n# Task"
)


def in_context(tokenizer: Any, **options: Any) -> InContextTokenizer:
    settings = {"max_prompt_tokens": 300, "max_tokens": 400, "context_pairs": MOST, **options}
    made = row_tokenizer(tokenizer, settings, {"ann": OWN})
    assert isinstance(made, InContextTokenizer)
    return made


def test_pairs_stand_in_front_of_a_plain_prompt(tokenizer: Any) -> None:
    assert show_pairs(OWN) == SHOWN
    row = Row("Write.", "is blue.", "is wide", "ann", "p", "pair", user_text="I like seas.")
    for settings, expected in (
        ({}, f"{SHOWN}\nWrite.\n"),
        ({"use_user_text": True}, f"I like seas.\n{SHOWN}\nWrite.\n"),
    ):
        made = in_context(tokenizer, **settings)
        assert tokenizer.decode(made.prompt(row)).removeprefix("<|endoftext|>") == expected
        assert made.prompt(row) == made.pair(row).prompt == made.tokens([row])[0].pair.prompt
    stranger = Row("Write.", "is blue.", "is wide", "bob", "p", "pair")
    assert tokenizer.decode(in_context(tokenizer).prompt(stranger)).endswith("Write.\n")
    assert "Example" not in tokenizer.decode(in_context(tokenizer).prompt(stranger))


def test_pairs_stand_in_the_system_turn_of_a_chat(tagged: Any) -> None:  # noqa: F811
    tagged.chat_template = CHATML
    prompt = tagged.decode(in_context(tagged).prompt(a_row(USER)))
    own = [{"role": "system", "content": SHOWN}, USER]
    assert prompt == tagged.apply_chat_template(own, tokenize=False, add_generation_prompt=True)


def test_pairs_for_which_there_is_no_room_are_left_out_whole(tokenizer: Any) -> None:
    row = Row("Write.", "is blue.", "is wide", "ann", "p", "pair")
    long = in_context(tokenizer)
    sizes = [len(long.whole.pair(long.with_pairs(row, OWN[:n])).prompt) for n in range(3)]
    response = max(len(one) for one in (long.pair(row).chosen, long.pair(row).rejected))
    for limits, number in (
        ({"max_prompt_tokens": sizes[2]}, 2),
        ({"max_prompt_tokens": sizes[2] - 1}, 1),
        ({"max_tokens": sizes[2] + response}, 2),
        ({"max_tokens": sizes[2] + response - 1}, 1),
        ({"max_tokens": sizes[1] - 1}, 0),
        ({"max_prompt_tokens": sizes[2] - 1, "on_long_prompt": "error"}, 1),
    ):
        made = in_context(tokenizer, **limits)
        assert made.pair(row).prompt == long.whole.pair(long.with_pairs(row, OWN[:number])).prompt


def leaks(data: Any, tokenizer: Any) -> tuple[set[str], list[int]]:
    """What stands in front of prompts and must not, and how many pairs stand before train prompts."""
    own: dict[str, list[Row]] = {}
    for row in data.datasets["train"].rows:
        own.setdefault(row.user_id, []).append(row)
    found, numbers = set(), []
    for split, dataset in data.datasets.items():
        for row, pair in zip(dataset.rows, dataset.pairs, strict=True):
            text = tokenizer.decode(pair.prompt)
            examples = text.split("# Task")[0].split("# Example ")[1:] if "# Task" in text else []
            numbers += [len(examples)] if split == "train" else []
            for example in examples:
                body = example.split("\n", 1)[1].strip()
                mine = [
                    one
                    for one in own.get(row.user_id, [])
                    if show_pairs([one]).split("\n", 1)[1].removesuffix("# Task").strip() == body
                ]
                if len(mine) == 0:
                    found.add(f"{split}: no train pair of the user")
                if any(shares_text(one, row) for one in mine):
                    found.add(f"{split}: a text of the pair asked")
    return found, numbers


SETTINGS: dict[str, Any] = {"max_prompt_tokens": 400, "max_tokens": 500, "context_pairs": MOST}


def test_what_stands_there_is_the_users_and_never_what_is_asked(
    tokenizer: Any, tmp_path: Path
) -> None:
    data = make_data(tokenizer, records=records(), **SETTINGS)
    found, numbers = leaks(data, tokenizer)
    assert found == set()
    assert set(numbers[:23]) == {1, 2, 3}  # ann's, who has enough of them
    assert {len(pairs) for user, pairs in data.own_pairs.items() if user != "cat"} == {MOST}
    assert set(data.own_pairs) == {"ann", "bob", "cat"}
    again = make_data(tokenizer, records=records(), **SETTINGS)
    other = make_data(tokenizer, records=records(), **{**SETTINGS, "seed": 4})
    four = make_data(tokenizer, records=records(), **SETTINGS, min_context_pairs=MOST)
    pairs = [[*one.datasets["train"].pairs] for one in (data, again, other, four)]
    assert pairs[0] == pairs[1] != pairs[2]
    assert set(leaks(four, tokenizer)[1][:23]) == {MOST}


def test_the_pair_asked_in_its_own_context_is_found(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published fault, planted twice: in the draw, which the last guard mends, and in the guard too."""
    everyone = lambda self, places, texts: np.zeros(places.shape, dtype=bool)  # noqa: E731
    monkeypatch.setattr(TrainPairs, "_shares_text", everyone)
    assert leaks(make_data(tokenizer, records=records(), **SETTINGS), tokenizer)[0] == set()
    monkeypatch.setattr("plrhf.data.in_context.shares_text", lambda one, other: False)
    found, _ = leaks(make_data(tokenizer, records=records(), **SETTINGS), tokenizer)
    assert "train: a text of the pair asked" in found
