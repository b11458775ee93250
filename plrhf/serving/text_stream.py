"""Turns the tokens of one answer into text as they come, up to a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from plrhf.data.tokenizer import Tokenizer


class TextStream:
    """The text of one answer, piece by piece.

    A piece is held back as long as it may be the beginning of a stop sequence. The stop sequence itself
    is left out of the text. The character NUL, which no judgment may hold, becomes U+FFFD, so that a text
    can be judged as it was shown.

    Args:
        tokenizer: a fast tokenizer. stop: sequences that end the text.

    Attributes:
        stopped: whether a stop sequence was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer: Any = tokenizer
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.stop = list(stop)
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain by now, which may be empty."""
        # Tokens that are a part of a character give None until it is complete.
        piece = self.decoder.step(self.tokenizer.backend_tokenizer, token)
        return "" if piece is None else self._add(piece.replace("\x00", "\ufffd"))

    def finish(self) -> str:
        """Return the rest of the text."""
        rest, self.held = self.held, ""
        return rest

    def _add(self, piece: str) -> str:
        text = self.held + piece
        ends = [at for at in (text.find(one) for one in self.stop) if at >= 0]
        if len(ends) > 0:
            self.stopped, self.held = True, ""
            return text[: min(ends)]
        n_held = max((_overlap(text, one) for one in self.stop), default=0)
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that is a beginning of `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
