"""Attention by FlexAttention, which skips blocks of positions that see nothing of one another.

Its naive twin is attention with a mask of all positions. Such a mask takes R L^2 numbers, and no fast
kernel of a GPU takes one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.flex_attention import compile_friendly_flex_attention

MaskFunction = Callable[[Any, Any, Any, Any], Any]
"""(row, head, query, key) -> whether the query sees the key; tensors that broadcast, or scalars."""

TOLERANCE = 2e-2
"""Largest difference allowed between FlexAttention and its twin, relative to the largest number."""


def block_mask(
    seen: MaskFunction, n_rows: int, n_queries: int, length: int, device: torch.device
) -> BlockMask:
    """Return a mask for FlexAttention, of the first `n_queries` queries that `seen` counts."""
    return create_block_mask(seen, n_rows, None, n_queries, length, device=str(device))


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, training: bool
) -> Tensor:
    """Compute softmax(Q K^T / sqrt(w) + mask) V of [R, H, M, w] over [R, H, L, w], compiled."""
    heads: Any = compile_friendly_flex_attention(
        query, key, value, training=training, block_mask=mask
    )
    return heads


@cache
def works_on(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether FlexAttention gives on a device what its twin gives; tried once, forward and back.

    Not so where torch finds no compiler, or the kernel not enough room for heads of this width.

    Args:
        width: of a head.
    """
    try:
        found = difference(device, dtype, width)
        why = f"it is {found:.1e} from attention with a mask"
    except Exception as error:
        found, why = float("inf"), f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if found <= TOLERANCE:
        return True
    say = rank_zero_only(print)
    say(f"FlexAttention does not work here ({why}); masks of all positions are used")
    return False


@torch.inference_mode(False)  # which validation may have turned on; gradients are compared too
def difference(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Compare outputs and gradients of FlexAttention with its twin's, relative to the largest number."""

    def seen(_row: Any, _head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & ((key < 70) | (key // 64 == query // 64))

    length = 200
    place = torch.arange(length, device=device)
    dense = seen(0, 0, place[:, None], place)
    mask = block_mask(seen, 1, length, length, device)
    found: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(3, 1, 2, length, width, generator=generator).to(device, dtype)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for in_blocks in (True, False):
            states = given.clone().requires_grad_()
            query, key, value = states.unbind()
            heads = (
                attend_in_blocks(query, key, value, mask, training=True)
                if in_blocks
                else scaled_dot_product_attention(query, key, value, attn_mask=dense)
            )
            heads.square().sum().backward()
            assert states.grad is not None
            found.append(torch.cat([heads.detach().flatten(), states.grad.flatten()]).double())
    return float((found[0] - found[1]).abs().max() / found[1].abs().max())
