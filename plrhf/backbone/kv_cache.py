"""A key-value cache that is allocated once."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Stores one block's keys and values in memory allocated once. The naive twin is `DynamicLayer`.

    `DynamicLayer` copies all keys and values for each new token, which takes most of the time of
    generation.

    Args:
        length: largest number of positions of a row.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.room: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new positions, each [N, H, n, d / H], and return all so far."""
        states = (key_states, value_states)
        if not self.room:
            self.lazy_initialization(*states)
            self.room = tuple(
                one.new_empty(*one.shape[:2], self.length, one.shape[3]) for one in states
            )
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        for room, new in zip(self.room, states, strict=True):
            room[:, :, before:after] = new
        self.keys, self.values = (room[:, :, :after] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at these indices; an index may be repeated."""
        n_held = self.get_seq_length()
        self.room = tuple(room[indices] for room in self.room)
        self.keys, self.values = (room[:, :, :n_held] for room in self.room)
