"""Writing files so that they appear whole and leave nothing half-written; errors of a full disk."""

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

PART = re.compile(r"\.[0-9a-f]{32}\.part$")
"""Ending of the names of half-written files."""

ABANDONED_AFTER = 60.0
"""Seconds without a write after which a half-written file counts as abandoned."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; the complete file then replaces `path`.

    After an error or a kill there is the old file, or none. Processes that write the same file at the
    same time do not mix, and the last one wins. A symbolic link at `path` is replaced, not followed.
    """
    with temporary_part(path.parent, path.name) as part:
        yield part
        os.replace(part, path)


@contextlib.contextmanager
def temporary_part(folder: Path, stem: str) -> Iterator[Path]:
    """Yield the path of an empty temporary file in a folder, which is removed unless it was renamed.

    Temporary files of dead processes are removed before.
    """
    remove_abandoned_parts(folder)
    part = folder / f"{stem}.{uuid.uuid4().hex}.part"
    try:
        with part.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # tells others that the writer is alive
            yield part
    finally:
        part.unlink(missing_ok=True)


def is_part(path: Path) -> bool:
    """Return whether a path is that of a half-written file."""
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
        if not is_disk_full(error):
            raise
        raise bad_value(field, folder, "a disk that is not full", cure) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that no disk space or quota is left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        # Libraries written in Rust and C++ keep the system's words, but not its number.
        if any(os.strerror(number) in str(error) for number in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
