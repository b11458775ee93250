"""Reads a JSON list value by value, so that a file of any size takes little memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

ObjectHook = Callable[[list[tuple[str, Any]]], Any]
NOT_SPACE = re.compile(r"[^ \t\r\n\ufeff]")
AFTER = tuple(" \t\r\n,]")
CHUNK = 2**16


def list_items(file: IO[str], *, object_hook: ObjectHook, longest: int) -> Iterator[Any]:
    """Yield the values of a file that is one JSON list.

    Args:
        object_hook: makes an object of its pairs of key and value. longest: characters of a value.

    Raises:
        OSError: it is no such list; the values before the fault have been yielded.
    """
    items = _Items(file, object_hook=object_hook, longest=longest)
    items.take("[")
    is_first = True
    while not (is_first and items.next_sign() == "]"):
        yield items.value()
        is_first = False
        if items.next_sign() == "]":
            break
        items.take(",")
    items.take("]")
    if items.next_sign() != "":
        raise OSError("not a JSON list: Extra data")


class _Items:
    """The text of a JSON list, which is read as far as it is needed."""

    def __init__(self, file: IO[str], *, object_hook: ObjectHook, longest: int) -> None:
        self._file, self._text, self._at, self._longest = file, "", 0, longest
        self._decode = json.JSONDecoder(object_pairs_hook=object_hook).raw_decode

    def _more(self) -> bool:
        """Read as much again as there is, at least 64 KiB; say whether there was more."""
        left = self._text[self._at :]
        new = self._file.read(max(CHUNK, len(left)))
        self._text, self._at = left + new, 0
        return new != ""

    def next_sign(self) -> str:
        """Move behind white space, and return the next character; nothing at the end."""
        while True:
            found = NOT_SPACE.search(self._text, self._at)
            if found is not None:
                self._at = found.start()
                return self._text[self._at]
            self._at = len(self._text)
            if not self._more():
                return ""

    def take(self, sign: str) -> None:
        """Move behind a character that must come next."""
        if self.next_sign() != sign:
            raise OSError(f"not a JSON list: Expecting {sign!r}")
        self._at += 1

    def value(self) -> Any:
        """Read the next value."""
        self.next_sign()
        while True:
            cause: Exception | None = None
            try:
                found, end = self._decode(self._text, self._at)
                if self._text[end : end + 1] in AFTER:  # else a number may go on
                    self._at = end
                    return found
            except (ValueError, RecursionError) as error:
                cause = error
            if len(self._text) - self._at > self._longest:
                raise OSError(f"not a JSON list: a value of more than {self._longest:,} characters")
            if not self._more():
                reason = cause.msg if isinstance(cause, json.JSONDecodeError) else cause
                raise OSError(f"not a JSON list: {reason or 'Expecting a comma'}") from cause
