"""Several short rows in one, so that the trunk computes less padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from plrhf.core.types import PADDING, is_planned


@dataclass
class RowPacking:
    """Where each position of R rows of length L stands in N < R packed rows of length L.

    Attributes:
        source: [N, L] int64, which of the R * L positions stands there, -1 for padding.
        n_rows: R.
    """

    source: Tensor
    n_rows: int

    @classmethod
    def of(cls, segment: Tensor) -> Self | None:
        """The packing of rows with these segments, or None where it would leave as many rows.

        Args:
            segment: [R, L] int64; all positions but padding are kept.
        """
        if is_planned(segment):  # a plan's rows are as long as can be
            return None
        n_rows, length = segment.shape
        is_text = (segment != PADDING).cpu()
        packed_rows = first_fit_decreasing(is_text.sum(dim=1).tolist(), length)
        if len(packed_rows) == n_rows:
            return None
        source = torch.full((len(packed_rows), length), -1)
        for place, rows in enumerate(packed_rows):
            text = torch.cat([is_text[row].nonzero()[:, 0] + row * length for row in rows])
            source[place, : len(text)] = text
        return cls(source.to(segment.device), n_rows)

    @property
    def source_row(self) -> Tensor:
        """The row that each position comes from, -1 for padding, [N, L]."""
        return self.source.div(self.source.shape[1], rounding_mode="floor")

    def pack(self, values: Tensor, padding: int = 0) -> Tensor:
        """Values [R, L, ...] of the rows as those of packed rows, [N, L, ...]."""
        packed = values.flatten(0, 1)[self.source.clamp(min=0)]
        is_padding = (self.source < 0).view(*self.source.shape, *[1] * (values.dim() - 2))
        return packed.masked_fill(is_padding, padding)

    def unpack(self, values: Tensor) -> Tensor:
        """Values [N, L, d] of packed rows as those of the rows, [R, L, d], 0 on padding."""
        is_text = self.source >= 0
        found = values.new_zeros(self.n_rows * self.source.shape[1], values.shape[-1])
        found = found.index_copy(0, self.source[is_text], values[is_text])
        return found.unflatten(0, (self.n_rows, -1))


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
