"""Lazy sequences, and a table of texts in a temporary file."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from operator import eq
from tempfile import SpooledTemporaryFile, gettempdir
from typing import Self, TypeVar, overload

import numpy as np
import pyarrow as arrow
import pyarrow.compute
from numpy.typing import NDArray

from plrhf.core.files import explain_full_disk

T = TypeVar("T", covariant=True)
Item = TypeVar("Item")
Indices = NDArray[np.int64]

BLOCK = 128
"""Number of rows in a block, which is read as a whole: 64 MB of the largest rows."""

IN_MEMORY = 32 * 2**20
"""Largest number of bytes of a file that is kept in memory instead of on disk."""


class LazySequence(Sequence[T]):
    """A sequence that makes items on demand. It equals any sequence with equal items."""

    @abstractmethod
    def item(self, index: int) -> T:
        """Make the item at an index from 0."""

    @abstractmethod
    def select(self, indices: Indices) -> Self:
        """Return the items at these indices, from 0, as a sequence of the same kind."""

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Self: ...
    def __getitem__(self, at: int | slice) -> T | Self:
        if isinstance(at, slice):
            return self.select(np.arange(len(self))[at])
        return self.item(range(len(self))[at])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]


def in_blocks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield the items in lists of `BLOCK`, the last of which may be shorter."""
    left = iter(items)
    while len(block := list(islice(left, BLOCK))) > 0:
        yield block


class TextTable:
    """Rows of optional texts in a temporary file of Arrow messages, one a block.

    The file is kept in memory while it is small, and it disappears with the process. Blocks are read
    rather than memory-mapped, so an iteration over all rows holds one block at a time. Arrow's own file
    reader has a thread, which would end the process with an error if it still held this file at exit.

    Args:
        names: of the columns.
        blocks: rows in lists of `BLOCK`, the last of which may be shorter. A row is a tuple of one
            text or None for each column.

    Attributes:
        digest: a hash of all rows.
    """

    def __init__(self, names: Sequence[str], blocks: Iterator[Sequence[tuple[str | None, ...]]]):
        self._schema = arrow.schema([(name, arrow.string()) for name in names])
        self._file = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115  (goes with this object)
        self._starts = [0]  # of each block in the file, and at last its size, in bytes
        self._last: tuple[int, arrow.RecordBatch] | None = None
        cure = "Free some space, or set TMPDIR to a directory on a larger disk"
        with explain_full_disk("TMPDIR", gettempdir(), cure):
            self.digest = self._write(names, blocks)
            self._file.flush()

    def _write(
        self, names: Sequence[str], blocks: Iterator[Sequence[tuple[str | None, ...]]]
    ) -> str:
        """Write the rows and return their hash."""
        digest = blake2b(repr(names).encode(), digest_size=16)
        for block in blocks:
            columns = [arrow.array(column, arrow.string()) for column in zip(*block, strict=True)]
            message = arrow.record_batch(columns, schema=self._schema).serialize()
            digest.update(message)
            self._file.write(message)
            self._starts.append(self._starts[-1] + message.size)
        return digest.hexdigest()

    def read(self, names: Sequence[str], indices: Indices) -> Iterator[list[list[str | None]]]:
        """Yield the named columns' values at the indices, in their order, some rows at a time.

        Indices should ascend, because the last block alone is kept.
        """
        for batch in self._batches(names, indices):
            yield [batch.column(name).to_pylist() for name in names]

    def content_hash(self, indices: Indices) -> str:
        """Hash the rows at the indices, in their order.

        The hash does not depend on the other rows of the table, nor on where blocks end: for each
        column the lengths of all texts and the bytes of all texts are hashed.
        """
        names = self._schema.names
        lengths = {name: blake2b(name.encode(), digest_size=16) for name in names}
        texts = {name: blake2b(digest_size=16) for name in names}
        for batch in self._batches(names, indices):
            for name in names:
                column = batch.column(name)
                of_texts = arrow.compute.binary_length(column).fill_null(-1)
                lengths[name].update(of_texts.to_numpy().tobytes())
                texts[name].update(_utf8(column))
        parts = [one.digest() for name in names for one in (lengths[name], texts[name])]
        return blake2b(b"".join(parts), digest_size=8).hexdigest()

    def _batches(self, names: Sequence[str], indices: Indices) -> Iterator[arrow.RecordBatch]:
        """Yield the named columns at the indices, of one block at a time."""
        if len(indices) == 0:
            return
        block = indices // BLOCK
        for run in np.split(indices, np.flatnonzero(np.diff(block)) + 1):
            number = int(run[0] // BLOCK)
            batch = self._block(number).select(names)
            if len(run) < batch.num_rows or (np.diff(run) != 1).any():
                batch = batch.take(arrow.array(run - number * BLOCK))
            yield batch

    def _block(self, number: int) -> arrow.RecordBatch:
        """Read a block of rows, unless it was the last one read."""
        if self._last is None or self._last[0] != number:
            self._last = None  # so that one block at a time is held
            start, stop = self._starts[number : number + 2]
            message = arrow.py_buffer(self._read(start, stop - start))
            self._last = number, arrow.ipc.read_record_batch(message, self._schema)
        return self._last[1]

    def _read(self, start: int, size: int) -> bytes:
        """Read bytes of the file. On disk its position stays: copies of the process share it."""
        if self._starts[-1] > IN_MEMORY:
            return os.pread(self._file.fileno(), size, start)
        self._file.seek(start)
        return self._file.read(size)


def _utf8(column: arrow.StringArray) -> memoryview:
    """Return the bytes of all texts of a column, concatenated; a null has none."""
    _, offsets, content = column.buffers()
    first, last = np.frombuffer(offsets, np.int32)[[column.offset, column.offset + len(column)]]
    return memoryview(content)[first:last]
