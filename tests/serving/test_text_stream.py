"""The text of an answer, token by token."""

from __future__ import annotations

from typing import Any

import pytest

from plrhf.serving.text_stream import TextStream

TEXT = "The sea is blue and wide, naïve — über 海 🌊 the end."


def pieces(tokenizer: Any, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What a stream gives for the tokens of a text, until it stops."""
    stream, found = TextStream(tokenizer, stop), []
    for token in tokenizer(text)["input_ids"]:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.finish()], stream.stopped


def test_pieces_are_the_text(tokenizer: Any) -> None:
    found, stopped = pieces(tokenizer, TEXT)
    assert "".join(found) == TEXT and not stopped
    assert len([piece for piece in found if piece]) > 10
    assert all("�" not in piece for piece in found)


def test_what_no_judgment_may_hold_is_replaced(tokenizer: Any) -> None:
    found, _ = pieces(tokenizer, "The sea\x00 is blue.")
    assert "".join(found) == "The sea\ufffd is blue."


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (("blue",), "The sea is "),
        ((" and wide, na",), "The sea is blue"),  # over several tokens
        (("wide", "sea"), "The "),  # the first in the text
        (("🌊",), "The sea is blue and wide, naïve — über 海 "),
        (("nothing", "the endless"), TEXT),  # held back at the end, and given then
    ],
)
def test_it_ends_at_a_stop_sequence(tokenizer: Any, stop: tuple[str, ...], kept: str) -> None:
    found, stopped = pieces(tokenizer, TEXT, stop)
    assert "".join(found) == kept
    assert stopped == (kept != TEXT)


def test_a_piece_is_held_back_while_it_may_be_a_stop(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, ["bcd"])
    given = [stream._add(piece) for piece in ("ab", "c", "e", "bb", "cd")]
    assert given == ["a", "", "bce", "b", ""]
    assert stream.stopped and stream.finish() == ""
