"""The file of texts of data=styles: one text a line, with its prompt and how it was generated."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from plrhf.core.errors import bad_value
from plrhf.core.files import open_to_append
from plrhf.data.style_attributes import words_of

LEAST_WORDS = 3
_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
_ROLE = re.compile(r"<\|?\w+\|?>|^\s*(?:user|assistant|system)\s*:", re.IGNORECASE | re.MULTILINE)


class StyleText(BaseModel):
    """A text with its prompt, its style, and the seed of its batch.

    Attributes:
        topic: of the prompt; prompts of the same topic are in the same split.
        dropped: why the text is not used; None if it is used.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt_id: str
    topic: str
    prompt: str
    style: str
    seed: int
    response: str
    dropped: str | None = None

    @property
    def key(self) -> str:
        """The words of the text; texts with equal keys are copies."""
        return " ".join(words_of(self.response))


def finished_part(response: str, *, ended: bool) -> tuple[str, str | None]:
    """Cut a text that did not end by itself after its last whole sentence or line.

    Returns:
        The text, and the reason to drop it if nothing is whole, else None.
    """
    text = response.strip()
    if ended:
        return text, None
    ends = [found.end() for found in _END.finditer(text)]
    lines = text.splitlines(keepends=True)
    if len(lines) > 1:
        ends.append(len("".join(lines[:-1]).rstrip()))
    return (text, "unfinished") if len(ends) == 0 else (text[: max(ends)], None)


def fault_of(text: StyleText, seen: Container[str]) -> str | None:
    """Return why a text is unusable (empty, repetitive, not plain text, or a copy); None if it is usable.

    Args:
        seen: keys of the texts kept so far.
    """
    words = words_of(text.response)
    if len(words) < LEAST_WORDS:
        return "empty"
    if _ROLE.search(text.response) is not None or not _is_plain(text.response):
        return "not text alone"
    fours = [tuple(words[start : start + 4]) for start in range(len(words) - 3)]
    if len(fours) - len(set(fours)) >= 2:
        return "repetitive"
    if text.key == " ".join(words_of(text.prompt)):
        return "copy of the prompt"
    return "duplicate" if text.key in seen else None


def read_texts(path: Path, *, cut_short: bool = False) -> list[StyleText]:
    """Read all texts of a file, including dropped ones.

    Args:
        cut_short: remove a last line that is incomplete after a kill.

    Raises:
        ValueError: there is no such file, or a line is not a text; the message names file and line.
    """
    if not path.is_file():
        cure = "Make it: python -m plrhf.cli.make_styles backbone.path=DIR out=FILE"
        raise bad_value("data.path", str(path), "a file of texts", cure)
    whole = path.read_bytes()
    if cut_short and not whole.endswith(b"\n"):
        whole = whole[: whole.rfind(b"\n") + 1]
        os.truncate(path, len(whole))
    texts = []
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if line.strip() == b"":
            continue
        try:
            texts.append(StyleText.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join([f"{path}:{number}", *map(str, first["loc"])])
            cure = "Make the file anew with plrhf.cli.make_styles"
            raise bad_value(
                field, first["type"], "a text as plrhf.cli.make_styles writes it", cure
            ) from error
    return texts


def append_texts(path: Path, texts: Iterable[StyleText]) -> None:
    """Append texts to a file in one write, so that a kill leaves at most one incomplete line."""
    lines = [json.dumps(text.model_dump(), ensure_ascii=False) + "\n" for text in texts]
    with open_to_append(path, mode="a", encoding="utf-8", newline="\n") as file:
        file.write("".join(lines))


def _is_plain(text: str) -> bool:
    """Return whether a text has only Latin letters and marks: no other script, no control characters."""
    return all(
        char == "\n" or (char.isprintable() and ord(char) < (0x250 if char.isalpha() else 0x2100))
        for char in text
    )
