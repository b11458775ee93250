"""Writing several files after an evaluation, so that a failure of one does not lose the others."""

from __future__ import annotations

import contextlib
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from plrhf.core.errors import BadValue
from plrhf.core.files import is_disk_full


class FilesMissing(Exception):
    """Raised at the end if some files could not be written; the message is one line."""


class Outputs:
    """Writes several files; an error in one is reported, and the others are still written.

        outputs = Outputs()
        with outputs.writing(path):
            write(path)
        outputs.check()

    Args:
        debug: print tracebacks.
    """

    def __init__(self, *, debug: bool = False) -> None:
        self.failed: list[str] = []
        self.debug = debug

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Print an error raised in this context instead of raising it, and delete the incomplete file.

        `check` raises it later.
        """
        try:
            yield
        except Exception as error:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            line = one_line(error)
            self.failed.append(path.name)
            print(f"error: {path.name} was not written: {line}", file=sys.stderr, flush=True)
            if self.debug:
                traceback.print_exc()

    def check(self) -> None:
        """Raise an error if a file could not be written.

        Raises:
            FilesMissing: names the files.
        """
        if len(self.failed) > 0:
            raise FilesMissing(f"{', '.join(self.failed)} could not be written; all else is there")


def one_line(error: BaseException) -> str:
    """Return an exception as one line for the terminal."""
    if isinstance(error, BadValue | FilesMissing):
        return str(error)
    if is_disk_full(error):
        return disk_full_line(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def disk_full_line(error: BaseException) -> str:
    """Return one line on which disk is full and what to do about it."""
    name = error.filename if isinstance(error, OSError) and error.filename else None
    where = "" if name is None else f" that {name} lies on"
    return f"the disk{where} is full: free space on it, or choose run_dir, cache_dir and TMPDIR on another"
