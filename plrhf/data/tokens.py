"""Tokens of pairs in an Arrow file, which is written once and memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as arrow
from numpy.typing import NDArray

from plrhf.core.processes import map_in_processes, n_cores
from plrhf.core.progress import Progress
from plrhf.data.cache_files import cache_file, intact_files
from plrhf.data.digests import content_hash
from plrhf.data.packing import TokenPair
from plrhf.data.rows import Rows
from plrhf.data.store import BLOCK, Indices, LazySequence
from plrhf.data.tokenizer import RowTokenizer

FIELDS = ("prompt", "chosen", "rejected")
FLAGS = ("prompt_cut", "response_cut", "history_cut")

PARALLEL_FROM = 2**15
"""Number of rows from which all cores tokenise: for fewer, other processes cost more than they save."""


class TokenFile(LazySequence[TokenPair]):
    """The token pairs of a file that `write_tokens` wrote, each read on demand.

    Attributes:
        lengths: number of tokens of prompt, chosen and rejected, [N, 3] int32.
        cut, response_cut: whether the prompt, or a response, was truncated, [N] bool. history_cut: whether
            earlier turns were left out.
        refused: why the chat template refuses a row, by index of the row.
    """

    def __init__(self, source: arrow.NativeFile) -> None:
        reader = arrow.ipc.open_file(source)
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        # Offsets and token ids of each field, block by block: views of the file.
        self._blocks = [[_parts(batch.column(name)) for name in FIELDS] for batch in batches]
        lengths = [np.stack([np.diff(ends) for ends, _ in one], axis=1) for one in self._blocks]
        self.lengths: NDArray[np.int32] = np.concatenate([np.empty((0, 3), np.int32), *lengths])
        self.cut, self.response_cut, self.history_cut = (_flags(batches, name) for name in FLAGS)
        refused = [one for batch in batches for one in batch.column("refused").to_pylist()]
        self.refused = {n: one for n, one in enumerate(refused) if one is not None}
        self._indices: Indices = np.arange(len(self.cut))

    def __len__(self) -> int:
        return len(self._indices)

    def item(self, index: int) -> TokenPair:
        """Return the pair at an index."""
        number, row = divmod(int(self._indices[index]), BLOCK)
        return TokenPair(
            *(tuple(ids[ends[row] : ends[row + 1]].tolist()) for ends, ids in self._blocks[number])
        )

    def select(self, indices: Indices) -> Self:
        """Return the pairs at these indices."""
        part = object.__new__(type(self))
        part._blocks, part._indices = self._blocks, self._indices[indices]
        part.lengths, part.cut = self.lengths[indices], self.cut[indices]
        part.response_cut = self.response_cut[indices]
        part.history_cut = self.history_cut[indices]
        part.refused = {
            n: self.refused[one] for n, one in enumerate(indices.tolist()) if one in self.refused
        }
        return part

    def __reduce__(self) -> Any:
        return list, (list(self),)


def _flags(batches: Sequence[Any], name: str) -> NDArray[np.bool_]:
    """Return a boolean column of all batches, [N]."""
    found = [batch.column(name).to_numpy(zero_copy_only=False) for batch in batches]
    return np.concatenate([np.empty(0, np.bool_), *found])


def _parts(column: arrow.ListArray) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the offsets and the token ids of a column of lists, without copying."""
    return column.offsets.to_numpy(), column.values.to_numpy()


def load_or_tokenize(
    rows: Rows, row_tokenizer: RowTokenizer, *, cache_dir: Path | None
) -> TokenFile:
    """Return the tokens of all rows from the cache, or tokenise the rows and add them to it.

    The name of the cached file contains a hash of texts, tokenizer and settings. A damaged file is
    written anew. Two processes that miss the same file both write it. Without a `cache_dir`, or if
    the tokenizer has no digest, the tokens are kept in memory.
    """
    stem = None if cache_dir is None else token_stem(rows, row_tokenizer)
    if cache_dir is None or stem is None:
        memory = arrow.BufferOutputStream()
        write_tokens(memory, rows, row_tokenizer)
        return TokenFile(arrow.BufferReader(memory.getvalue()))
    if not intact_files(cache_dir, stem, ".arrow"):
        with cache_file(cache_dir, stem, ".arrow") as part, arrow.OSFile(str(part), "wb") as file:
            write_tokens(file, rows, row_tokenizer)
    return TokenFile(arrow.memory_map(str(intact_files(cache_dir, stem, ".arrow")[0])))


def token_stem(rows: Rows, row_tokenizer: RowTokenizer) -> str | None:
    """Return how the name of the file with these rows' tokens begins; None without a tokenizer's digest."""
    tokenizer = row_tokenizer.digest()
    if tokenizer is None:
        return None
    key = content_hash(rows.digest(with_people=row_tokenizer.reads_people), tokenizer)
    return f"tokens-{key}"


def write_tokens(file: arrow.NativeFile, rows: Rows, row_tokenizer: RowTokenizer) -> None:
    """Write the tokens of all rows, including rows that are too long.

    An id takes two bytes if the vocabulary allows it, else four. From `PARALLEL_FROM` rows on, all cores
    tokenise, a block of rows at a time.
    """
    ids = arrow.uint16() if len(row_tokenizer.tokenizer) <= 2**16 else arrow.int32()
    schema = arrow.schema(
        [
            *((name, arrow.list_(ids)) for name in FIELDS),
            *((name, arrow.bool_()) for name in FLAGS),
            ("refused", arrow.string()),
        ]
    )

    def tokenized(start: int) -> arrow.RecordBatch:
        found = row_tokenizer.tokens(list(rows[start : start + BLOCK]))
        columns = [[getattr(one.pair, name) for one in found] for name in FIELDS]
        columns += [[getattr(one, name) for one in found] for name in (*FLAGS, "refused")]
        arrays = [arrow.array(one, kind) for one, kind in zip(columns, schema.types, strict=True)]
        return arrow.record_batch(arrays, schema=schema)

    blocks = range(0, len(rows), BLOCK)
    n_processes = n_cores() if len(rows) >= PARALLEL_FROM else 1
    with (
        arrow.ipc.new_file(file, schema) as writer,
        Progress("tokenising", total=len(rows)) as progress,
    ):
        for batch in map_in_processes(tokenized, blocks, n_processes):
            writer.write_batch(batch)
            progress.update(batch.num_rows)
