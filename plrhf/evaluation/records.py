"""The JSON files of a run directory as typed records, one class for each file.

Each file holds a digest of its content, so that a damaged one is not taken for another result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from plrhf.core.errors import bad_value
from plrhf.core.files import whole_file
from plrhf.data.digests import DIGEST, check_digest, content_hash, json_text

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
    write_text(path, record_text(record))


def record_text(record: Record) -> str:
    """Return a record as it is written, JSON; see `write_record`."""
    return json_text(record.to_json(), indent=2)


class _PlainDumper(yaml.SafeDumper):
    """Writes YAML without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases, by which a small file can stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("settings have no aliases")
        return super().compose_node(parent, index)


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings as YAML, with a digest in the first line."""
    text = yaml.dump(dict(settings), Dumper=_PlainDumper, sort_keys=False)
    write_text(path, f"# {DIGEST} {content_hash(text)}\n{text}")


def read_settings(path: Path) -> dict[str, Any]:
    """Read settings that `write_settings` wrote, or YAML written by hand, which has no digest.

    Raises:
        ValueError: the file is damaged or altered.
    """
    cure = "Copy it anew, or remove its first line if you altered it yourself"
    _check_is_file(path)
    try:
        text = path.read_text(encoding="utf-8")
        first, _, rest = text.partition("\n")
        if first.startswith(f"# {DIGEST} ") and first.split()[-1] != content_hash(rest):
            raise bad_value(str(path), first, "the digest of the lines below", cure)
        found = yaml.load(text, Loader=_PlainLoader)
    except (UnicodeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise bad_value(str(path), reason, "a YAML file", "Copy it anew") from error
    if not isinstance(found, dict):
        raise bad_value(str(path), found, "settings by name", "Copy it anew")
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text to a temporary file and rename it, so that no reader finds half of it."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def _check_is_file(path: Path) -> None:
    """Raise a ValueError for a pipe or a device, which would be waited for or have no end."""
    if path.exists() and not path.is_file():
        raise bad_value(str(path), "no plain file", "a file", "Copy it anew")


def read_record(path: Path, kind: type[R]) -> R:
    """Read a record from its file.

    Raises:
        ValueError: the file is damaged or of another version; the message names file and key.
    """
    _check_is_file(path)
    return _record_of(path.read_bytes(), kind, path)


def read_lines(path: Path, kind: type[R]) -> Iterator[R]:
    r"""Yield the records of a file that has one on each line.

    Only ``\n`` ends a line. JSON leaves other Unicode line separators, such as U+2028, in texts.

    Raises:
        ValueError: a line is damaged; the message names file, line and key.
    """
    _check_is_file(path)
    with path.open("rb") as file:  # bytes, which end lines by \n only
        for number, line in enumerate(file, start=1):
            if line.strip() != b"":
                yield _record_of(line, kind, path, place=f"{path}:{number}")


def _record_of(text: bytes, kind: type[R], path: Path, *, place: str | None = None) -> R:
    """Return the record that JSON of a file holds; `place` is named in messages, by default the file."""
    place, cure = str(path) if place is None else place, f"Write {path.name} anew"
    try:
        content = from_json(text)
    except ValueError as error:
        found = text.decode(errors="replace")
        raise bad_value(place, found, f"JSON ({error})", cure) from error
    try:
        record = kind.model_validate(content)
    except ValidationError as error:
        raise _damaged(place, error, cure) from error
    check_digest(place, content, cure)
    return record


def _damaged(place: str, error: ValidationError, cure: str) -> Exception:
    """Return the error for a damaged record, which names the first wrong key."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    expected = first["msg"].removeprefix("Input should be ")
    found, allowed = first["input"], f"{expected[:1].lower()}{expected[1:]}"
    if first["type"] == "missing":
        found, allowed = None, "a value, as the key is missing"
    return bad_value(f"{place} {key}".strip(), found, allowed, cure)
