"""Cache files, which appear whole, can be checked for damage, and leave no half-written parts."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from plrhf.core.errors import bad_value
from plrhf.data.digests import file_digest

PART = re.compile(r"\.[0-9a-f]{32}\.part$")
"""Ending of the names of half-written files."""

ABANDONED_AFTER = 60.0
"""Seconds without a write after which a half-written file counts as abandoned."""

FULL = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def cache_file(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
    """Yield a temporary path to write to; the complete file is then renamed.

    The final name ``stem-DIGEST suffix`` contains a hash of the content, by which `intact_files`
    recognises damaged files. A kill leaves no file with such a name, and two processes that write the
    same content leave one file. The folder is made, and temporary files of dead processes are removed.

    Raises:
        ValueError: the disk is full; the half-written file is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned_parts(folder)
    part = folder / f"{stem}.{uuid.uuid4().hex}.part"
    cure = "Free some space, or set cache_dir to a directory on a larger disk"
    try:
        with explain_full_disk("cache_dir", str(folder), cure), part.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # tells others that the writer is alive
            yield part
            os.replace(part, folder / f"{stem}-{file_digest(part)}{suffix}")
    finally:
        part.unlink(missing_ok=True)


def intact_files(folder: Path, stem: str, suffix: str) -> list[Path]:
    """Return the undamaged files that `cache_file` wrote with this stem, and delete damaged ones."""
    intact = []
    for path in sorted(folder.glob(f"{stem}-*{suffix}")):
        try:
            if path.name == f"{stem}-{file_digest(path)}{suffix}":
                intact.append(path)
            else:
                path.unlink(missing_ok=True)
        except OSError:
            continue  # another process removed it, or it cannot be read
    return intact


def is_part(path: Path) -> bool:
    """Return whether a path is that of a half-written file of `cache_file`."""
    return PART.search(path.name) is not None


def remove_abandoned_parts(folder: Path) -> None:
    """Delete the temporary files in a folder whose processes no longer run."""
    for part in folder.glob("*.part"):
        if not is_part(part):
            continue
        with contextlib.suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - part.stat().st_mtime > ABANDONED_AFTER:
                part.unlink()


@contextlib.contextmanager
def explain_full_disk(field: str, folder: str, cure: str) -> Iterator[None]:
    """Turn any library's error for a full disk into one clear line, in this context."""
    try:
        yield
    except Exception as error:
        if not _says_full(error):
            raise
        raise bad_value(field, folder, "a disk that is not full", cure) from error


def _says_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, reports that no disk space or quota is left."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    # Libraries written in Rust and C++ keep the system's words, but not its number.
    if any(os.strerror(number) in str(error) for number in FULL):
        return True
    return _says_full(error.__cause__ or error.__context__)
