"""Writing files so that they appear whole and leave nothing half-written; errors of a full disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

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
def temporary_folder(folder: Path, stem: str) -> Iterator[Path]:
    """Yield the path of an empty temporary folder in a folder; it is removed unless it was renamed.

    Those of dead processes are removed before.
    """
    remove_abandoned_parts(folder)
    part = folder / f"{stem}.{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        with _locked(part, fcntl.LOCK_SH):
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def temporary_part(folder: Path, stem: str) -> Iterator[Path]:
    """Yield the path of an empty temporary file in a folder, which is removed unless it was renamed.

    Temporary files of dead processes are removed before.
    """
    remove_abandoned_parts(folder)
    part = folder / f"{stem}.{uuid.uuid4().hex}.part"
    try:
        part.open("xb").close()
        with _locked(part, fcntl.LOCK_SH):
            yield part
    finally:
        part.unlink(missing_ok=True)


def check_new(field: str, folder: Path) -> None:
    """Raise a ValueError unless a folder is empty or not there, so that nothing in it is written through.

    Args:
        field: the setting that names it.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        allowed = "a folder that is empty or not there"
        raise bad_value(field, str(folder), allowed, f"Set {field} to another folder")


def open_to_append(path: Path, **options: Any) -> IO[Any]:
    """Open a file to write at its end.

    Raises:
        ValueError: it is a symbolic link, which is not followed.
    """
    if path.is_symlink():
        raise bad_value(
            str(path), "a symbolic link", "a file", "Remove the link, or name its target"
        )
    return path.open(**options)


def is_part(path: Path) -> bool:
    """Return whether a path is that of a half-written file."""
    return PART.search(path.name) is not None


def remove_abandoned_parts(folder: Path) -> None:
    """Delete the temporary files and folders in a folder whose processes no longer run."""
    for part in folder.glob("*.part"):
        if not is_part(part):
            continue
        with contextlib.suppress(OSError), _locked(part, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if time.time() - part.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(part) if part.is_dir() else part.unlink()


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """Hold a lock on a file or folder, by which others know that its writer is alive."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


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
