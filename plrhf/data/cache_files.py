"""Cache files, which appear whole and can be checked for damage."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from plrhf.core.files import explain_full_disk, temporary_part
from plrhf.data.digests import file_digest


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
    cure = "Free some space, or set cache_dir to a directory on a larger disk"
    full = explain_full_disk("cache_dir", str(folder), cure)
    with full, temporary_part(folder, stem) as part:
        yield part
        os.replace(part, folder / f"{stem}-{file_digest(part)}{suffix}")


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
