"""Columns of text in an Arrow file of a process's own: in memory while small, else in a temporary file."""

from __future__ import annotations

import contextlib
import os
import uuid
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from operator import eq
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, Self, TypeVar, overload

import numpy as np
import pyarrow as arrow
from numpy.typing import NDArray

T = TypeVar("T", covariant=True)
Item = TypeVar("Item")
Indices = NDArray[np.int64]

BLOCK = 4096
"""Rows of a block, the unit that is read."""

IN_MEMORY = 32 * 2**20
"""Bytes up to which a file is not worth a place on the disk."""


class LazySequence(Sequence[T]):
    """A sequence whose items are made when they are asked for; equal to any of equal items."""

    @abstractmethod
    def item(self, place: int) -> T:
        """Make the item at a place from 0."""

    @abstractmethod
    def select(self, indices: Indices) -> Self:
        """The items at these places, from 0, as a sequence of the same kind."""

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


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Where to write a file that is given the name `path`, of a directory made for it, once it is
    complete: a kill leaves none half, and of two processes at once either's stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    yield part
    os.replace(part, path)


def in_blocks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """The items, `BLOCK` at a time."""
    left = iter(items)
    while len(block := list(islice(left, BLOCK))) > 0:
        yield block


class TextTable:
    """Rows of optional texts, written once and read by block and column.

    The file has no name and goes with the process. Its blocks are read, not mapped, so that a walk
    through all of them holds one at a time.

    Args:
        names: of the columns. blocks: rows in lists of `BLOCK` (the last may be shorter), a row
            being a tuple of one text or None a column.

    Attributes:
        digest: of all the file holds.
    """

    def __init__(self, names: Sequence[str], blocks: Iterator[Sequence[tuple[str | None, ...]]]):
        schema = arrow.schema([(name, arrow.string()) for name in names])
        self._place = {name: place for place, name in enumerate(names)}
        self._file = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115  (goes with this object)
        digest = blake2b(repr(names).encode(), digest_size=16)
        with arrow.ipc.new_file(arrow.PythonFile(self._file, "w"), schema) as writer:
            for block in blocks:
                columns = [
                    arrow.array(column, arrow.string()) for column in zip(*block, strict=True)
                ]
                batch = arrow.record_batch(columns, schema=schema)
                digest.update(batch.serialize())
                writer.write_batch(batch)
        self.digest = digest.hexdigest()

    def read(self, names: Sequence[str], places: Indices) -> Iterator[list[list[Any]]]:
        """Yield the named columns' values at the places, in order, some rows at a time.

        Indices should ascend: each change of block is a reading.
        """
        if len(places) == 0:
            return
        options = arrow.ipc.IpcReadOptions(included_fields=[self._place[name] for name in names])
        reader = arrow.ipc.open_file(arrow.PythonFile(self._file, "r"), options=options)
        block = places // BLOCK
        for run in np.split(places, np.flatnonzero(np.diff(block)) + 1):
            number = int(run[0] // BLOCK)
            batch = reader.get_batch(number)
            if len(run) < batch.num_rows or (np.diff(run) != 1).any():
                batch = batch.take(arrow.array(run - number * BLOCK))
            yield [batch.column(name).to_pylist() for name in names]
