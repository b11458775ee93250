"""Tokens of pairs in a file of the cache, which is written once and memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from plrhf.core.processes import map_in_processes, n_cores
from plrhf.core.progress import Progress
from plrhf.data.cache_files import CachedArrays, cache_file, cached
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
    """The token pairs of rows, each read on demand.

    Args:
        arrays: what `_tokenize` makes, in memory or in a file of the cache.

    Attributes:
        lengths: number of tokens of prompt, chosen and rejected, [N, 3] int32.
        cut, response_cut: whether the prompt, or a response, was truncated, [N] bool. history_cut: whether
            earlier turns were left out.
        refused: why the chat template refuses a row, by index of the row.

    Raises:
        DamagedFile: the file is damaged; here or when a pair is read.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]] | CachedArrays) -> None:
        self._ids = arrays["ids"]
        self.lengths: NDArray[np.int32] = arrays["lengths"][:].copy()
        self.cut, self.response_cut, self.history_cut = arrays["flags"][:].T.copy()
        refused = json.loads(arrays["refused"][:].tobytes())
        self.refused = {int(index): why for index, why in refused.items()}
        self._starts = np.concatenate([[0], self.lengths.sum(axis=1, dtype=np.int64).cumsum()])
        self._indices: Indices = np.arange(len(self.lengths))

    def __len__(self) -> int:
        return len(self._indices)

    def item(self, index: int) -> TokenPair:
        """Return the pair at an index."""
        row = self._indices[index]
        ids = tuple(self._ids[self._starts[row] : self._starts[row + 1]].tolist())
        prompt, chosen, _ = self.lengths[index].tolist()
        return TokenPair(ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :])

    def select(self, indices: Indices) -> Self:
        """Return the pairs at these indices."""
        part = object.__new__(type(self))
        part._ids, part._starts, part._indices = self._ids, self._starts, self._indices[indices]
        part.lengths, part.cut = self.lengths[indices], self.cut[indices]
        part.response_cut = self.response_cut[indices]
        part.history_cut = self.history_cut[indices]
        part.refused = {
            n: self.refused[one] for n, one in enumerate(indices.tolist()) if one in self.refused
        }
        return part

    def __reduce__(self) -> Any:
        return list, (list(self),)


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
        ids: list[NDArray[Any]] = []
        arrays = _tokenize(rows, row_tokenizer, ids.append)
        return TokenFile({"ids": np.concatenate(ids), **arrays})
    if len(found := cached(cache_dir, stem, TokenFile)) == 0:
        with cache_file(cache_dir, stem) as file:
            for name, array in _tokenize(rows, row_tokenizer, partial(file.add, "ids")).items():
                file.add(name, array)
        found = cached(cache_dir, stem, TokenFile)
    return found[0]


def token_stem(rows: Rows, row_tokenizer: RowTokenizer) -> str | None:
    """Return how the name of the file with these rows' tokens begins; None without a tokenizer's digest."""
    tokenizer = row_tokenizer.digest()
    if tokenizer is None:
        return None
    key = content_hash(rows.digest(with_people=row_tokenizer.reads_people), tokenizer)
    return f"tokens-{key}"


def _tokenize(
    rows: Rows, row_tokenizer: RowTokenizer, keep: Callable[[NDArray[Any]], None]
) -> dict[str, NDArray[Any]]:
    """Tokenise all rows, including rows that are too long, and give all but their ids.

    An id takes two bytes if the vocabulary allows it, else four. From `PARALLEL_FROM` rows on, all cores
    tokenise, a block of rows at a time.

    Args:
        keep: is given the ids of all rows, block by block: those of prompt, chosen and rejected of a row,
            and then those of the next.

    Returns:
        The arrays "lengths" [N, 3], "flags" [N, 3], and "refused", the reasons by index of the row as JSON.
    """
    kind = np.uint16 if len(row_tokenizer.tokenizer) <= 2**16 else np.int32

    def tokenized(start: int) -> tuple[Any, ...]:
        found = row_tokenizer.tokens(list(rows[start : start + BLOCK]))
        texts = [getattr(one.pair, name) for one in found for name in FIELDS]
        flags = [[getattr(one, name) for name in FLAGS] for one in found]
        refused = {start + n: one.refused for n, one in enumerate(found) if one.refused is not None}
        ids = np.array([*chain.from_iterable(texts)], kind)
        lengths = np.array([*map(len, texts)], np.int32).reshape(-1, len(FIELDS))
        return ids, lengths, np.array(flags, np.bool_), refused

    lengths, flags, refused = [np.empty((0, 3), np.int32)], [np.empty((0, 3), np.bool_)], {}
    keep(np.empty(0, kind))  # also without rows
    blocks = range(0, len(rows), BLOCK)
    n_processes = n_cores() if len(rows) >= PARALLEL_FROM else 1
    with Progress("tokenising", total=len(rows)) as progress:
        for ids, *of_rows, why in map_in_processes(tokenized, blocks, n_processes):
            keep(ids)
            lengths.append(of_rows[0])
            flags.append(of_rows[1])
            refused.update(why)
            progress.update(len(of_rows[0]))
    return {
        "lengths": np.concatenate(lengths),
        "flags": np.concatenate(flags),
        "refused": np.frombuffer(json.dumps(refused).encode(), np.uint8),
    }
