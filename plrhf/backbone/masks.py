"""Attention masks of packed rows, given to all layers of a model through transformers.

A transformers model asks for the mask of each kind of its layers (full, sliding, chunked) with a
function of two positions. Within `packed_rows`, that function gets positions in the text instead of
positions in the row, and is combined with the packing's own mask. Windows and chunks are therefore the
model's own, and are the same in a packed row as in a row of one response.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from plrhf.backbone.block_attention import MaskFunction, block_mask
from plrhf.backbone.devices import product_dtype
from plrhf.core.row_index import Extent, extent_of
from plrhf.core.types import PROMPT

FLEX, SDPA = "flex_attention", "sdpa"
IMPLEMENTATIONS = ("eager", SDPA, FLEX)


def visible(query: Tensor, key: Tensor, query_segment: Tensor, key_segment: Tensor) -> Tensor:
    """Return whether a query position sees a key position in the packed layout.

    It sees itself, and earlier positions of the prompt and of its own response, never the other
    response. Padding sees itself, so that no softmax is over nothing.

    Args:
        query, key: indices in the row. query_segment, key_segment: their segments.
    """
    return (key <= query) & ((key_segment == PROMPT) | (key_segment == query_segment))


@dataclass
class PackedRows:
    """Packed rows, and how many masks a model has asked for in the context `packed_rows`.

    Attributes:
        segment: [R, L] int64. positions: positions in the text, [R, L] int64.
        owner: original row of each position if several share a row, [R, L]; rows do not see each other.
        branch: context of each position, [R, L], 0 for shared prompts; contexts do not see each other.
        until: last position that sees each position, [R, L], in the place of all marks; None: these say it.
        extent: computed by the loader; None: not computed yet.
        in_blocks: whether to make a `BlockMask` in the place of a mask of all positions.
        n_asked: number of masks that the model has asked for.
    """

    segment: Tensor
    positions: Tensor
    owner: Tensor | None = None
    branch: Tensor | None = None
    extent: Extent | None = None
    until: Tensor | None = None
    in_blocks: bool = False
    n_asked: int = field(default=0)

    def can_see(self, row: Any, query: Any, key: Any) -> Any:
        """Return whether position `query` of a row sees position `key`; the indices are broadcast."""
        if self.until is not None:
            return (key <= query) & (query <= self.until[row, key])
        allowed = visible(query, key, self.segment[row, query], self.segment[row, key])
        if self.owner is not None:
            allowed = allowed & (self.owner[row, query] == self.owner[row, key])
        if self.branch is not None:
            of_key = self.branch[row, key]
            allowed = allowed & ((of_key == 0) | (of_key == self.branch[row, query]))
        return allowed

    def get_extent(self) -> Extent:
        """Return the extent; if the loader has not computed it, a GPU must be waited for."""
        if self.extent is None:
            marks = (self.segment, self.owner, self.branch)
            self.extent = extent_of(*(None if one is None else one.cpu() for one in marks))  # type: ignore[arg-type]
        return self.extent

    def mask_function(self, own: MaskFunction) -> MaskFunction:
        """Return the mask function of these rows for layers whose own mask function is `own`."""
        positions = self.positions

        def seen(row: Any, head: Any, query: Any, key: Any) -> Any:
            distances = own(row, head, positions[row, query], positions[row, key])
            return self.can_see(row, query, key) & distances

        return seen


def visibility(rows: PackedRows) -> Tensor:
    """Return which position sees which, [R, L, L] bool."""
    n_rows, length = rows.segment.shape
    row, place = (torch.arange(n, device=rows.segment.device) for n in (n_rows, length))
    return rows.can_see(row[:, None, None], place[:, None], place)


_rows: ContextVar[PackedRows | None] = ContextVar("packed_rows", default=None)


@contextlib.contextmanager
def packed_rows(rows: PackedRows) -> Iterator[PackedRows]:
    """Make transformers models use the masks of these packed rows in this context."""
    token = _rows.set(rows)
    try:
        yield rows
    finally:
        _rows.reset(token)


def _with_packing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the mask maker of an attention implementation; outside `packed_rows` it does as before."""

    def make_mask(**given: Any) -> Any:
        rows = _rows.get()
        if rows is None:
            return original(**given)
        rows.n_asked += 1
        seen = rows.mask_function(given["mask_function"])
        if name == FLEX or (name == SDPA and rows.in_blocks):
            n_rows, length = rows.segment.shape
            return block_mask(seen, n_rows, length, length, rows.segment.device)
        mask = original(
            **{
                **given,
                "mask_function": seen,
                "attention_mask": None,  # padding has a segment of its own
                "allow_is_causal_skip": False,
                "allow_is_bidirectional_skip": False,
                "use_vmap": False,
            }
        )
        return additive(mask, given["dtype"]) if name == SDPA else mask

    return make_mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask of who sees whom into numbers to add, as torch's attention would in every layer."""
    numbers = torch.zeros(mask.shape, dtype=product_dtype(mask.device, dtype), device=mask.device)
    return numbers.masked_fill_(~mask, -torch.inf)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **given: Any,
) -> Any:
    """Attend as transformers does by torch's attention, or in blocks where the mask is of blocks."""
    by = flex_attention_forward if isinstance(attention_mask, BlockMask) else _by_torch
    return by(module, query, key, value, attention_mask, **given)


_by_torch = ALL_ATTENTION_FUNCTIONS[SDPA]
AttentionInterface.register(SDPA, attend)


for _name in IMPLEMENTATIONS:
    AttentionMaskInterface.register(
        _name, _with_packing(_name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
    )
