"""Reading what torch.save wrote: checked for damage, and nothing is unpickled."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch

DAMAGED = (
    *(BadZipFile, OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError),
    *(UnpicklingError, zlib.error, struct.error),
)
"""What `load_checked` raises for a damaged file; a ValueError where a name is no longer UTF-8."""


def load_checked(path: Path) -> Any:
    """Load a file of torch.save to the CPU, and compare its checksums, which torch itself does not.

    Raises:
        Exception: one of `DAMAGED`, if the file is cut short, altered or holds more than plain data.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(str(path))
    with ZipFile(path) as archive:  # torch.save writes a CRC-32 with each record
        damaged = archive.testzip()
    if damaged is not None:
        raise BadZipFile(f"checksum of {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)
