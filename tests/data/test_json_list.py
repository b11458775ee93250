"""A JSON list that is read value by value is the list that is read whole."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import pytest

from plrhf.data.sources import json_list
from plrhf.data.sources.json_list import list_items


def items_of(text: str, longest: int = 10_000) -> list[Any]:
    return list(list_items(io.StringIO(text), object_hook=dict, longest=longest))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_values_are_those_of_the_whole(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "CHUNK", chunk)
    draw = random.Random(chunk)
    values = [
        "a]",
        'say "hi" \\',
        "\u2028",
        12345,
        -1.5e-7,
        None,
        True,
        [],
        {},
        [1, [2]],
        {"a": "}"},
    ]
    for _ in range(60):
        expected = draw.choices(values, k=draw.randint(0, 6))
        text = json.dumps(expected, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
        space = "".join(draw.choices(" \n\t\r", k=2))
        assert items_of(f"\ufeff{space}{text}{space}") == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[1",
        "[1,",
        "[1,]",
        "[,]",
        "[1 2]",
        "[1]2",
        "[1]]",
        '["a]',
        "[tru]",
        "[" * 9_999,
        "{}",
    ]
    + ["[" + "0" * 99_999, '["' + "x" * 99_999 + '"]'],
)
def test_what_is_no_list_is_an_error(text: str) -> None:
    with pytest.raises(OSError, match="^not a JSON list: "):
        items_of(text)
