"""Digests by which a damaged or altered file is recognised: of whole files, and inside JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plrhf.core.errors import bad_value

DIGESTS = "digests.json"
"""File in a folder with the digests of the folder's other files."""

DIGEST = "digest"
"""Key of the digest of the other keys. JSON without it, as written by hand, is read unchecked."""

# With these options json.dumps would make an encoder a call.
_to_json = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode


def content_hash(*content: object) -> str:
    """Hash JSON-able content to 16 hexadecimal digits, the same in every process."""
    # Texts by themselves, as what encodes a list is made anew for each.
    text = f"[{', '.join(map(_to_json, content))}]"
    # Sources hash text before it is checked, lone surrogates included.
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def file_digest(path: Path) -> str:
    """Return the BLAKE2b hash of a file's content, as 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def folder_digests(folder: Path, *, without: Sequence[str] = ()) -> dict[str, str]:
    """Return the digests of all files in a folder by name, without those in `without`."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: file_digest(path)
        for name, path in sorted(files.items())
        if path.is_file() and name not in without
    }


def seal_folder(folder: Path) -> None:
    """Write the digests of a folder's files into it."""
    digests = folder_digests(folder, without=[DIGESTS])
    (folder / DIGESTS).write_text(json_text(digests, indent=1))


def is_intact(folder: Path) -> bool:
    """Whether the files of a folder are those that `seal_folder` has seen."""
    try:
        written = json.loads((folder / DIGESTS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    found = folder_digests(folder, without=[DIGESTS])
    return isinstance(written, dict) and {**found, DIGEST: content_hash(found)} == written


def json_text(content: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Return content as JSON with its digest (anew if it has one), and an end of line."""
    plain = {name: value for name, value in content.items() if name != DIGEST}
    sealed = {**plain, DIGEST: content_hash(plain)}
    return json.dumps(sealed, indent=indent, allow_nan=False, ensure_ascii=False) + "\n"


def check_digest(place: str, content: Mapping[str, Any], cure: str) -> None:
    """Raise a ValueError if content read from JSON has a digest that is not that of the rest.

    Args:
        place: the file, and the line in it, for messages. cure: how to get a whole one.
    """
    digest = content.get(DIGEST)
    rest = {name: value for name, value in content.items() if name != DIGEST}
    if digest is not None and digest != content_hash(rest):
        raise bad_value(
            f"{place} {DIGEST}",
            digest,
            "the digest of the content, which was damaged or altered",
            f"{cure}, or remove the key {DIGEST} if you altered it yourself",
        )
