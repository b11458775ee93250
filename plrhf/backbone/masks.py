"""Which position sees which, as a mask for each implementation of attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from plrhf.core.types import PROMPT

FLEX = "flex_attention"


def visible(query: Tensor, key: Tensor, of_query: Tensor, of_key: Tensor) -> Tensor:
    """Whether a position sees another in the packed layout.

    It sees itself and earlier positions of the prompt and of its own response, never the other
    response; padding, which nobody sees, sees the prompt: no softmax is over nothing.

    Args:
        query, key: where they stand. of_query, of_key: their segments.
    """
    return (key <= query) & ((of_key == PROMPT) | (of_key == of_query))


def sees(segment: Tensor, owner: Tensor | None = None) -> Tensor:
    """Which position sees which, [R, L] -> [R, L, L] bool.

    Args:
        owner: [R, L], whose each position is where several pairs are in a row: none sees another's.
    """
    place = torch.arange(segment.shape[1], device=segment.device)
    seen = visible(place[:, None], place, segment[:, :, None], segment[:, None, :])
    return seen if owner is None else seen & (owner[:, :, None] == owner[:, None, :])


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """`sees` as it is added to attention's scores, [R, L, L] bool -> [R, 1, L, L]."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def block_mask(segment: Tensor, owner: Tensor | None = None) -> BlockMask:
    """`sees` for FlexAttention, which skips blocks of positions that see nothing of one another."""
    whose = torch.zeros_like(segment) if owner is None else owner

    def of_row(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = visible(query, key, segment[row, query], segment[row, key])
        return seen & (whose[row, query] == whose[row, key])

    n_rows, length = segment.shape
    return create_block_mask(of_row, n_rows, None, length, length, device=str(segment.device))
