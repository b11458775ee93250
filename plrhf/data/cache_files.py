"""Arrays in files of a cache, which appear whole, and whose blocks are checked when they are first read.

A file holds the bytes of its arrays, the digest of each `BLOCK_BYTES` of them, the arrays' names, types
and shapes as JSON, and the number of the arrays' bytes. The digest of all that follows the arrays is in
the file's name. So opening reads the end of a file alone, and no bit of it is used unchecked.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from plrhf.core.errors import BadValue, bad_value, printable
from plrhf.core.files import explain_full_disk, temporary_part

Read = TypeVar("Read")

BLOCK_BYTES = 2**12
"""Number of bytes that are checked together: a page of memory."""

DIGEST_BYTES = 8

SUFFIX = ".arrays"
"""Of the names of files. Files with another one are of other versions of this package, and left alone."""


class DamagedFile(BadValue):
    """A file of a cache is damaged, and has been removed, so that it is not found again."""

    path: Path


def _digest(content: Any) -> bytes:
    return blake2b(content, digest_size=DIGEST_BYTES).digest()


def _name_digest(end: Any) -> str:
    """Return the digest of what follows the arrays, another one where blocks are of another size."""
    return blake2b(end, digest_size=16, salt=BLOCK_BYTES.to_bytes(8)).hexdigest()


class ArrayWriter:
    """Writes arrays to a file, one after the other."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._arrays: dict[str, tuple[str, list[int]]] = {}  # type and shape
        self._digests: list[bytes] = []
        self._block = blake2b(digest_size=DIGEST_BYTES)
        self._n_bytes = 0

    def add(self, name: str, rows: NDArray[Any]) -> None:
        """Append rows [N, ...] to the array that was begun last, or begin one with another name."""
        _, shape = self._arrays.setdefault(name, (rows.dtype.str, [0, *rows.shape[1:]]))
        shape[0] += len(rows)
        content = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        self._file.write(content)
        while len(content) > 0:
            part = content[: BLOCK_BYTES - self._n_bytes % BLOCK_BYTES]
            self._block.update(part)
            self._n_bytes += len(part)
            if self._n_bytes % BLOCK_BYTES == 0:
                self._end_block()
            content = content[len(part) :]

    def _end_block(self) -> None:
        self._digests.append(self._block.digest())
        self._block = blake2b(digest_size=DIGEST_BYTES)

    def end(self) -> str:
        """Write what follows the arrays, and return its digest."""
        if self._n_bytes % BLOCK_BYTES > 0:
            self._end_block()
        shapes = json.dumps(self._arrays).encode()
        end = b"".join([*self._digests, shapes, self._n_bytes.to_bytes(8, "little")])
        self._file.write(end)
        return _name_digest(end)


@contextlib.contextmanager
def cache_file(folder: Path, stem: str) -> Iterator[ArrayWriter]:
    """Yield a writer of arrays to a temporary file, which then becomes ``stem-DIGEST.arrays``.

    A kill leaves no file with such a name, and two processes that write the same content leave one
    file. The folder is made, and temporary files of dead processes are removed.

    Raises:
        ValueError: the disk is full; the half-written file is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cure = "Free some space, or set cache_dir to a directory on a larger disk"
    full = explain_full_disk("cache_dir", str(folder), cure)
    with full, temporary_part(folder, stem) as part:
        with part.open("r+b") as file:
            writer = ArrayWriter(file)
            yield writer
            digest = writer.end()
        os.replace(part, folder / f"{stem}-{digest}{SUFFIX}")


class CachedArray:
    """An array [N, ...] in a file of a cache, whose rows are checked when they are first read."""

    def __init__(self, file: CachedArrays, rows: NDArray[Any], start: int) -> None:
        self._file, self._rows, self._start = file, rows, start
        self._row_bytes = rows.strides[0]

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[Any]:
        """Return a view of the rows of a slice without a step, or a copy of the rows at indices.

        Raises:
            DamagedFile: one of them is damaged.
        """
        if isinstance(rows, slice):
            first, stop, _ = rows.indices(len(self._rows))
            self._check(first, stop)
        else:
            for row in rows.tolist():
                self._check(row, row + 1)
        return self._rows[rows]

    def _check(self, first: int, stop: int) -> None:
        start = self._start
        self._file.check(start + first * self._row_bytes, start + stop * self._row_bytes)


class CachedArrays:
    """The arrays by name in a file that `cache_file` wrote, which is mapped.

    Raises:
        DamagedFile: the file's end is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            is_empty = os.fstat(file.fileno()).st_size == 0
            held = b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._content = memoryview(held)
        self.n_bytes = int.from_bytes(self._content[-8:], "little")
        end = self._content[self.n_bytes :]
        if path.stem.rpartition("-")[2] != _name_digest(end):
            raise self._damaged()
        self._is_checked = bytearray(-(-self.n_bytes // BLOCK_BYTES))
        self._digests = bytes(end[: DIGEST_BYTES * len(self._is_checked)])
        self._arrays: dict[str, CachedArray] = {}
        start = 0
        for name, (kind, shape) in json.loads(bytes(end[len(self._digests) : -8])).items():
            rows: NDArray[Any] = np.ndarray(shape, kind, self._content, start)
            self._arrays[name] = CachedArray(self, rows, start)
            start += rows.nbytes

    def __getitem__(self, name: str) -> CachedArray:
        return self._arrays[name]

    def check(self, start: int, stop: int) -> None:
        """Check the blocks that hold these bytes, unless they were checked before.

        Raises:
            DamagedFile: one of them is damaged.
        """
        for number in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            if not self._is_checked[number]:
                first, place = number * BLOCK_BYTES, number * DIGEST_BYTES
                block = self._content[first : min(first + BLOCK_BYTES, self.n_bytes)]
                if _digest(block) != self._digests[place : place + DIGEST_BYTES]:
                    raise self._damaged()
                self._is_checked[number] = True

    def _damaged(self) -> DamagedFile:
        """Remove the file, and return (not raise) the error."""
        with contextlib.suppress(OSError):  # another process has, or this one may not
            self.path.unlink()
        cure = "Repeat the command, which makes it anew"
        words = bad_value(str(self.path), "damaged", "the content that was written", cure)
        error = DamagedFile(str(words))
        error.path = self.path
        return error


@contextlib.contextmanager
def made_anew() -> Iterator[None]:
    """Go on if a file turns out to be damaged in this context, and print a line that names it."""
    try:
        yield
    except DamagedFile as error:
        print(f"damaged and removed, to be made anew: {printable(str(error.path))}", flush=True)


def cached(folder: Path, stem: str, read: Callable[[CachedArrays], Read]) -> list[Read]:
    """Read the files that `cache_file` wrote with this stem, without damaged ones, which are removed."""
    found = []
    for path in sorted(folder.glob(f"{stem}-*{SUFFIX}")):
        # Another process may remove it.
        with contextlib.suppress(OSError), made_anew():
            found.append(read(CachedArrays(path)))
    return found


def is_whole(path: Path) -> bool:
    """Check all of a file that `cache_file` wrote; a damaged one is removed."""
    try:
        file = CachedArrays(path)
        file.check(0, file.n_bytes)
    except (DamagedFile, OSError):
        return False
    return True
