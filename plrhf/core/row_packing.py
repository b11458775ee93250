"""Several short rows in one, so that the trunk computes less padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from plrhf.core.types import PADDING


@dataclass
class RowPacking:
    """Where the positions of R rows of length L stand in N < R packed rows of length L.

    It is made where batches are made, on the CPU: a GPU would have to wait for the lengths of rows.

    Attributes:
        source, target: [K] int64, for each of the K positions that are not padding, its index among
            all R * L and among all N * L positions.
        n_rows, n_packed, length: R, N and L.
        n_vectors: how many of the L positions are user vectors in front of the text.
    """

    source: Tensor
    target: Tensor
    n_rows: int
    n_packed: int
    length: int
    n_vectors: int = 0

    @classmethod
    def of(cls, segment: Tensor, *, n_vectors: int = 0) -> Self | None:
        """The packing of rows with these segments, or None if it would leave as many rows.

        Args:
            segment: [R, L - n_vectors] int64 on the CPU, of text; all positions but padding are kept.
            n_vectors: user vectors that will stand in front of each row.
        """
        n_rows, length = segment.shape[0], segment.shape[1] + n_vectors
        is_kept = torch.nn.functional.pad(segment != PADDING, (n_vectors, 0), value=True)
        packed_rows = first_fit_decreasing(is_kept.sum(dim=1).tolist(), length)
        if len(packed_rows) == n_rows:
            return None
        sources, targets = [], []
        for place, rows in enumerate(packed_rows):
            kept = torch.cat([is_kept[row].nonzero()[:, 0] + row * length for row in rows])
            sources.append(kept)
            targets.append(torch.arange(len(kept)) + place * length)
        source, target = torch.cat(sources), torch.cat(targets)
        return cls(source, target, n_rows, len(packed_rows), length, n_vectors)

    def repeated(self, n_times: int) -> RowPacking:
        """The packing of the rows repeated `n_times`, each time packed alike."""
        if n_times == 1:
            return self
        times = torch.arange(n_times, device=self.source.device)[:, None]
        return RowPacking(
            source=(self.source + times * self.n_rows * self.length).flatten(),
            target=(self.target + times * self.n_packed * self.length).flatten(),
            n_rows=self.n_rows * n_times,
            n_packed=self.n_packed * n_times,
            length=self.length,
            n_vectors=self.n_vectors,
        )

    @property
    def source_row(self) -> Tensor:
        """The row that each packed position comes from, -1 for padding, [N, L] int64."""
        row = self.source.div(self.length, rounding_mode="floor")
        found = torch.full((self.n_packed * self.length,), -1, device=row.device)
        return found.index_copy(0, self.target, row).unflatten(0, (self.n_packed, -1))

    def pack(self, values: Tensor, padding: int = 0) -> Tensor:
        """Values [R, L, ...] of the rows as those of packed rows, [N, L, ...]."""
        kept = values.flatten(0, 1).index_select(0, self.source)
        found = kept.new_full((self.n_packed * self.length, *kept.shape[1:]), padding)
        return found.index_copy(0, self.target, kept).unflatten(0, (self.n_packed, -1))

    def unpack(self, values: Tensor) -> Tensor:
        """Values [N, L, ...] of packed rows as those of the rows, [R, L, ...], 0 on padding."""
        kept = values.flatten(0, 1).index_select(0, self.target)
        found = kept.new_zeros(self.n_rows * self.length, *kept.shape[1:])
        return found.index_copy(0, self.source, kept).unflatten(0, (self.n_rows, -1))


def first_fit_decreasing(lengths: list[int], room: int) -> list[list[int]]:
    """Assign rows to packed rows of length `room`: the longest first, each to the first that fits it.

    It needs at most 11/9 of the fewest possible and 6/9 (Dosa 2007, doi 10.1007/978-3-540-74450-4_1).

    Args:
        lengths: of the rows, each at most `room`.

    Returns:
        For each packed row, the rows that stand in it, in their order there.
    """
    packed_rows: list[list[int]] = []
    free: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        place = next((at for at, left in enumerate(free) if lengths[row] <= left), len(free))
        if place == len(free):
            packed_rows.append([])
            free.append(room)
        packed_rows[place].append(row)
        free[place] -= lengths[row]
    return packed_rows
