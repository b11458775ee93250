"""A key-value cache in which rows come and go while others are continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass
class Columns:
    """Which columns of a cache hold positions of rows: from `first` to before `end`."""

    first: int = 0
    end: int = 0


class SlotLayer(DynamicLayer):
    """Keys and values of one block for S rows, [S, H, room, d / H]. New positions are written at `end`.

    All rows end in the same column, and begin in columns of their own.

    Args:
        states: keys and values of the rows. columns: shared by all blocks; the owner moves its `end`.
    """

    def __init__(self, states: Sequence[Tensor], columns: Columns) -> None:
        super().__init__()
        self.room = tuple(states)
        self.columns, self.is_initialized = columns, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        first, end = self.columns.first, self.columns.end
        after = end + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, end:after] = new
        keys, values = (room[:, :, first:after] for room in self.room)
        return keys, values

    def get_seq_length(self) -> int:
        return self.columns.end - self.columns.first


class SlotCache(DynamicCache):
    """The cache of all blocks.

    Args:
        like: a cache of some rows, of `Backbone.cache` or of this class, whose shapes it takes.
        n_slots: S. room: number of columns.
    """

    def __init__(self, like: Any, columns: Columns, *, n_slots: int, room: int) -> None:
        super().__init__()
        self.layers = [
            SlotLayer(
                [one.new_zeros(n_slots, one.shape[1], room, one.shape[3]) for one in layer.room],
                columns,
            )
            for layer in like.layers
        ]

    def place(self, rows: Any, like: Any, at: Any, columns: slice, taken: slice) -> None:
        """Copy columns `taken` of the rows `at` of another cache to rows and columns of this one."""
        own: Any
        for own, other in zip(self.layers, like.layers, strict=True):
            for room, new in zip(own.room, other.room, strict=True):
                room[rows, :, columns] = new[at][:, :, taken]
