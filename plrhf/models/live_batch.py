"""Writes texts in one batch that others join and leave between two tokens (continuous batching)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from plrhf.backbone.kv_cache import RoomyLayer
from plrhf.backbone.slot_cache import Columns, SlotCache
from plrhf.models.generation import left_padded

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule

Row = TypeVar("Row")

MORE_COLUMNS = 64
"""Columns that a new cache has for further tokens."""

CALL_TOKENS = 256
"""A further call of the trunk takes about as long as reading so many tokens."""


def can_join(model: PersonalModule) -> bool:
    """Return whether texts of a model can join and leave a batch.

    Each row's cache must be plain, and the aggregator must say how users act on later tokens: a subclass
    that changes `decoding` alone does not.
    """
    backbone, aggregator = model.backbone, model.aggregator
    cache = backbone.cache(1)
    if cache is None or not backbone.writes_with_cache:
        return False
    no_user = torch.empty(0, 0, device=model.device)
    if aggregator.continuing(backbone, no_user) is None:
        return False
    begins, continues = (
        next(one for one in type(aggregator).__mro__ if name in vars(one))
        for name in ("decoding", "continuing")
    )
    is_plain = all(isinstance(layer, RoomyLayer) for layer in cache.layers)
    return is_plain and issubclass(continues, begins)


class LiveBatch(Generic[Row]):
    """Texts that are written together, one token of each at a step. The naive twin is `write_batch`.

    Each text has a slot: a row of the cache. The slot of a text that has left is free for another one, and
    is computed in vain until the batch is packed anew.

    Args:
        model: one for which `can_join` is true, in eval mode.

    Attributes:
        rows: what the caller knows the text in each slot by; None: a free slot.
    """

    def __init__(self, model: PersonalModule) -> None:
        self.model = model
        self.clear()

    def clear(self) -> None:
        """Let all texts leave."""
        device = self.model.device
        self.rows: list[Row | None] = []
        self.columns = Columns()
        self.cache: SlotCache | None = None
        self.mask = torch.zeros(0, 0, dtype=torch.int64, device=device)  # [S, room]
        self.user = torch.zeros(0, 0, device=device)  # [S, user_dim]

    def __len__(self) -> int:
        return sum(row is not None for row in self.rows)

    @torch.no_grad()
    def join(self, rows: Sequence[Row], prompts: Sequence[Sequence[int]], user: Tensor) -> Tensor:
        """Add texts with their prompts and user vectors; return the logits of their first tokens.

        Args:
            prompts: of M texts, none empty. user: [M, user_dim] on the model's device.

        Returns:
            [M, V] float32.
        """
        read, mask, logits = self._read(prompts, user)
        n_new, length = mask.shape
        full = self.rows.count(None) < n_new or self.columns.end == self.mask.shape[1]
        if self.cache is None or full or self.columns.end < length:
            self._pack(read, user, n_more=n_new, length=length)
        assert self.cache is not None
        free = [slot for slot, row in enumerate(self.rows) if row is None][:n_new]
        for slot, row in zip(free, rows, strict=True):
            self.rows[slot] = row
        at = torch.tensor(free, device=user.device)
        end = self.columns.end
        self.cache.place(at, read, slice(None), slice(end - length, end), slice(0, length))
        self.mask[at] = 0
        self.mask[at, end - length : end] = mask
        self.user[at] = user
        self._see_first()
        return logits

    def leave(self, rows: Sequence[Row]) -> None:
        """Remove texts. When the last one has left, nothing of any is kept in memory."""
        for row in rows:
            self.rows[self.rows.index(row)] = None
        if len(self) == 0:
            self.clear()
        elif len(rows) > 0:
            self._see_first()

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Continue all texts by their newest tokens [S]; return the logits of the next ones.

        `make_room` is called before.

        Returns:
            [S, V] float32; those of free slots mean nothing.
        """
        backbone, columns = self.model.backbone, self.columns
        self.mask[:, columns.end] = 1
        seen = self.mask[:, columns.first : columns.end + 1]
        acting = self.model.aggregator.continuing(backbone, self.user)
        assert acting is not None
        with acting:
            hidden = backbone.trunk(
                input_ids=tokens[:, None],
                attention_mask=seen,
                position_ids=seen.sum(dim=1, keepdim=True) - 1 + backbone.first_position,
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        columns.end += 1
        return backbone.unembed(hidden[:, -1]).float()

    def make_room(self) -> None:
        """Make room for a token, and drop slots if half of them are free. It may change slots."""
        if 2 * len(self) <= len(self.rows) or self.columns.end == self.mask.shape[1]:
            self._pack(self.cache, self.user)

    def _read(
        self, prompts: Sequence[Sequence[int]], user: Tensor
    ) -> tuple[object, Tensor, Tensor]:
        """Compute the cache of M new texts, its mask [M, length], and the logits after them [M, V]."""
        model, backbone = self.model, self.model.backbone
        ids, mask = (one.to(user.device) for one in left_padded(prompts))
        cache = backbone.cache(model.aggregator.n_positions + ids.shape[1])
        assert cache is not None
        n_spared = (len(prompts) - len({tuple(one) for one in prompts})) * (ids.shape[1] - 1)
        if model.aggregator.shares_prompts and n_spared > CALL_TOKENS:
            backbone.prefill(cache, ids, mask)  # reads equal prompts once
        n_read = cache.get_seq_length()
        with model.aggregator.decoding(backbone, ids, mask, user) as inputs:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0) + backbone.first_position
            hidden = backbone.trunk(
                input_ids=ids[:, n_read:],
                attention_mask=mask,
                position_ids=positions[:, n_read:],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return cache, mask, backbone.unembed(hidden[:, -1]).float()

    def _pack(self, like: object, user: Tensor, *, n_more: int = 0, length: int = 0) -> None:
        """Move the texts to a cache with `n_more` free slots and at least `length` columns used.

        Args:
            like, user: a cache and user vectors of the shapes of this batch.
        """
        kept = [slot for slot, row in enumerate(self.rows) if row is not None]
        old, before, used = self.cache, self.columns, self.columns.end - self.columns.first
        end = max(used, length)
        n_slots = len(kept) + n_more
        self.columns = Columns(end=end)
        self.cache = SlotCache(like, self.columns, n_slots=n_slots, room=end + MORE_COLUMNS)
        mask = self.mask.new_zeros(n_slots, end + MORE_COLUMNS)
        of_slots = user.new_zeros(n_slots, user.shape[1])
        if len(kept) > 0:
            now, at = slice(0, len(kept)), torch.tensor(kept, device=user.device)
            taken, placed = slice(before.first, before.end), slice(end - used, end)
            self.cache.place(now, old, at, placed, taken)
            mask[now, placed], of_slots[now] = self.mask[at, taken], self.user[at]
        self.mask, self.user = mask, of_slots
        self.rows = [*(self.rows[slot] for slot in kept), *([None] * n_more)]
        self._see_first()

    def _see_first(self) -> None:
        """Note the first column that a text uses."""
        kept = [slot for slot, row in enumerate(self.rows) if row is not None]
        used = self.mask[kept].any(dim=0).nonzero()
        self.columns.first = int(used[0]) if len(used) > 0 else self.columns.end
