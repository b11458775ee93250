"""Which position sees which in packed rows, given to every layer of a model through transformers.

A model of transformers asks for the mask of each kind of its layers (full, sliding, chunked) by a
function of two indices. Within `packed_rows` that function is asked about positions in the text in
place of indices in the row, and joined with what packing allows. So windows and chunks are the model's
own, and count in the rejected response as they would in a row of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from plrhf.core.row_index import Extent, extent_of
from plrhf.core.types import PROMPT

FLEX = "flex_attention"
IMPLEMENTATIONS = ("eager", "sdpa", FLEX)
MaskFunction = Callable[[Any, Any, Any, Any], Any]
"""(row, head, query, key) -> whether the query sees the key; tensors that broadcast, or scalars."""


def visible(query: Tensor, key: Tensor, of_query: Tensor, of_key: Tensor) -> Tensor:
    """Say whether a position sees another in the packed layout.

    It sees itself and earlier positions of the prompt and of its own response, never the other
    response. Padding, which nobody sees, sees itself at least: no softmax is over nothing.

    Args:
        query, key: their indices. of_query, of_key: their segments.
    """
    return (key <= query) & ((of_key == PROMPT) | (of_key == of_query))


@dataclass
class PackedRows:
    """Rows that hold several texts, and which kinds of layers have asked for their mask.

    Attributes:
        segment: [R, L] int64. positions: [R, L] int64, in the text.
        owner: [R, L], the row each position comes from where several stand in one: none sees another's.
        branch: [R, L], the context each position belongs to, 0 for all: none sees another's.
        extent: as the loader has found it; None: not yet.
        n_asked: masks that the model has asked for.
    """

    segment: Tensor
    positions: Tensor
    owner: Tensor | None = None
    branch: Tensor | None = None
    extent: Extent | None = None
    n_asked: int = field(default=0)

    def seen(self, row: Any, query: Any, key: Any) -> Any:
        """Say whether position `query` of a row sees position `key`: indices, which broadcast."""
        allowed = visible(query, key, self.segment[row, query], self.segment[row, key])
        if self.owner is not None:
            allowed = allowed & (self.owner[row, query] == self.owner[row, key])
        if self.branch is not None:
            of_key = self.branch[row, key]
            allowed = allowed & ((of_key == 0) | (of_key == self.branch[row, query]))
        return allowed

    def measured(self) -> Extent:
        """Return the extent; a GPU that no loader has spared this has to wait for it."""
        if self.extent is None:
            marks = (self.segment, self.owner, self.branch)
            self.extent = extent_of(*(None if one is None else one.cpu() for one in marks))  # type: ignore[arg-type]
        return self.extent

    def over(self, own: MaskFunction) -> MaskFunction:
        """Return the mask of these rows for layers whose own mask is `own`."""
        positions = self.positions

        def seen(row: Any, head: Any, query: Any, key: Any) -> Any:
            distances = own(row, head, positions[row, query], positions[row, key])
            return self.seen(row, query, key) & distances

        return seen


def sees(rows: PackedRows) -> Tensor:
    """Say which position sees which, [R, L, L] bool."""
    n_rows, length = rows.segment.shape
    row, place = (torch.arange(n, device=rows.segment.device) for n in (n_rows, length))
    return rows.seen(row[:, None, None], place[:, None], place)


_rows: ContextVar[PackedRows | None] = ContextVar("packed_rows", default=None)


@contextlib.contextmanager
def packed_rows(rows: PackedRows) -> Iterator[PackedRows]:
    """Within it, models make the masks of these packed rows."""
    token = _rows.set(rows)
    try:
        yield rows
    finally:
        _rows.reset(token)


def block_mask(seen: MaskFunction, n_rows: int, length: int, device: torch.device) -> BlockMask:
    """Return a mask for FlexAttention, which skips blocks of positions that see nothing of each other."""
    return create_block_mask(seen, n_rows, None, length, length, device=str(device))


def _aware_of_packing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the mask maker of an attention implementation; outside `packed_rows` it is as before."""

    def make_mask(**given: Any) -> Any:
        rows = _rows.get()
        if rows is None:
            return original(**given)
        rows.n_asked += 1
        seen = rows.over(given["mask_function"])
        if name == FLEX:
            n_rows, length = rows.segment.shape
            return block_mask(seen, n_rows, length, rows.segment.device)
        return original(
            **{
                **given,
                "mask_function": seen,
                "attention_mask": None,  # padding has a segment of its own
                "allow_is_causal_skip": False,
                "allow_is_bidirectional_skip": False,
                "use_vmap": False,
            }
        )

    return make_mask


for _name in IMPLEMENTATIONS:
    AttentionMaskInterface.register(
        _name, _aware_of_packing(_name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
    )
