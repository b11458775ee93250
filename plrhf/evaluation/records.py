"""The JSON files of a run directory as typed records, one class for each file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from plrhf.core.errors import bad_value

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """The content of a JSON file. Unknown keys, as from a later version, are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)

    def to_json(self) -> dict[str, Any]:
        """Return the record as the file holds it."""
        return self.model_dump(mode="json", by_alias=True)


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON, so that a reader never finds half a file.

    Raises:
        ValueError: a number is nan or infinite, which JSON does not allow.
    """
    text = json.dumps(record.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text to a temporary file and rename it, so that no reader finds half of it."""
    aside = path.with_name(f"{path.name}.part")
    try:
        aside.write_text(text, encoding="utf-8", newline="\n")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_record(path: Path, kind: type[R]) -> R:
    """Read a record from its file.

    Raises:
        ValueError: the file is damaged or of another version; the message names file and key.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise damaged(path, error) from error


def read_lines(path: Path, kind: type[R]) -> Iterator[R]:
    r"""Yield the records of a file that has one on each line.

    Only ``\n`` ends a line. JSON leaves other Unicode line separators, such as U+2028, in texts.

    Raises:
        ValueError: a line is damaged; the message names file, line and key.
    """
    with path.open("rb") as file:  # bytes, which end lines by \n only
        for number, line in enumerate(file, start=1):
            if line.strip() == b"":
                continue
            try:
                yield kind.model_validate_json(line)
            except ValidationError as error:
                raise damaged(path, error, line=number) from error


def damaged(path: Path, error: ValidationError, *, line: int | None = None) -> Exception:
    """Return the error for a damaged file, which names the first wrong key."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    place = str(path) if line is None else f"{path}:{line}"
    found = None if first["type"] == "missing" else first["input"]
    if isinstance(found, bytes):
        found = found.decode(errors="replace")
    expected = first["msg"].removeprefix("Input should be ")
    allowed = f"{expected[:1].lower()}{expected[1:]}"
    if first["type"] == "missing":
        allowed = "a value, as the key is missing"
    return bad_value(f"{place} {key}".strip(), found, allowed, f"Write {path.name} anew")
