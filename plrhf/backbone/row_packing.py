"""Several short rows in one, so that the trunk reads less padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from plrhf.core.types import PADDING, is_planned


@dataclass
class Filled:
    """Which position of which row stands where, [N, L] for R rows of L, N < R.

    Attributes:
        places: [N, L] int64, positions counted through all rows, -1 for padding.
        n_rows: R.
    """

    places: Tensor
    n_rows: int

    @classmethod
    def of(cls, segment: Tensor) -> Self | None:
        """Rows put together where that leaves fewer of them, None where it does not.

        Args:
            segment: [R, L] int64, of which all but padding is kept.
        """
        if is_planned(segment):  # its rows are as long as can be
            return None
        n_rows, room = segment.shape
        is_text = (segment != PADDING).cpu()
        rows = first_fit(is_text.sum(dim=1).tolist(), room)
        if len(rows) == n_rows:
            return None
        places = torch.full((len(rows), room), -1)
        for place, together in enumerate(rows):
            text = torch.cat([is_text[row].nonzero()[:, 0] + row * room for row in together])
            places[place, : len(text)] = text
        return cls(places.to(segment.device), n_rows)

    @property
    def owner(self) -> Tensor:
        """The row that each position comes from, -1 for padding, [N, L]."""
        return self.places.div(self.places.shape[1], rounding_mode="floor")

    def take(self, values: Tensor, filler: int = 0) -> Tensor:
        """Values [R, L, ...] as they stand now [N, L, ...], `filler` on padding."""
        taken = values.flatten(0, 1)[self.places.clamp(min=0)]
        is_padding = (self.places < 0).view(*self.places.shape, *[1] * (values.dim() - 2))
        return taken.masked_fill(is_padding, filler)

    def put_back(self, values: Tensor) -> Tensor:
        """Values [N, L, d] as they stood before, [R, L, d], 0 on padding."""
        is_text = self.places >= 0
        found = values.new_zeros(self.n_rows * self.places.shape[1], values.shape[-1])
        found = found.index_copy(0, self.places[is_text], values[is_text])
        return found.unflatten(0, (self.n_rows, -1))


def first_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Rows of these lengths put together into few of length `room`: first-fit decreasing.

    Few is at most 11/9 times the fewest possible and 6/9 (Dosa 2007, doi 10.1007/978-3-540-74450-4_1).

    Args:
        lengths: each at most `room`.

    Returns:
        For each row to be, which rows stand in it, in their order there.
    """
    together: list[list[int]] = []
    left: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        place = next((at for at, free in enumerate(left) if lengths[row] <= free), len(left))
        if place == len(left):
            together.append([])
            left.append(room)
        together[place].append(row)
        left[place] -= lengths[row]
    return together
