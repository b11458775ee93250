"""Texts of any origin as they are shown."""

from __future__ import annotations

import pytest

from plrhf.core.errors import printable, visible


@pytest.mark.parametrize(
    ("text", "in_a_terminal", "on_a_page"),
    [
        ("\x1b[31mred\x07", r"\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\u202eabc\u2069", r"\u202eabc\u2069", r"\u202eabc\u2069"),
        ("a\nb\tc\r", r"a\nb\tc\r", "a\nb\tc\\r"),
        ("\ud800", r"\ud800", r"\ud800"),
        ("été 👩\u200d👧 日本", r"été 👩\u200d👧 日本", "été 👩\u200d👧 日本"),
    ],
)
def test_what_would_be_executed_is_spelled_out(
    text: str, in_a_terminal: str, on_a_page: str
) -> None:
    assert printable(text) == in_a_terminal
    assert visible(text) == on_a_page
