"""GPT-J's blocks for packed rows: transformers' weights with fewer operations.

transformers' own blocks are the naive twin. These blocks skip attention between positions that never
see each other, the last block's work on positions whose output is not used, repeated computation of
rotations, and intermediate results of the activation. In generation, they avoid a copy of all rotations
for each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gptj.modeling_gptj import GPTJAttention, GPTJBlock

from plrhf.backbone import devices
from plrhf.backbone.block_attention import attend_in_blocks, block_mask
from plrhf.backbone.chunked_attention import ChunkedAttention
from plrhf.backbone.masks import PackedRows, additive, visibility
from plrhf.backbone.tanh_gelu import tanh_gelu

KERNEL_BLOCK = 32
"""Block size of torch's fused attention on CPUs, in positions."""

LONGEST_CHUNKED = 2048
"""Longest rows for which `ChunkedAttention` is used. Up to this length its attention weights take no
more memory than the block's other activations, with heads of width 64."""

GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")
"""Names of the tanh approximation of GELU. transformers computes the first in five operations."""


@dataclass
class AttentionLayout:
    """How the positions of a batch see each other, for all blocks.

    Attributes:
        first_read, n_causal: see `row_index.Extent`.
        mask: [R, 1, M, L], added to scores; None if there are `blocks`. Its M queries are the positions
            from `first_read` on, rounded down to a multiple of `KERNEL_BLOCK`; all positions if
            `chunked`. It is then [1, 1, L, L] if every position sees all before it.
        rotations: of each position, [R, L, 1, rotary / 2] complex64.
        chunked: use `ChunkedAttention`.
        blocks: masks for FlexAttention, of all positions as queries and of those from `first_read` on;
            None: it is not used.
    """

    first_read: int
    n_causal: int
    mask: Tensor | None
    rotations: Tensor
    chunked: bool = False
    blocks: tuple[BlockMask, BlockMask] | None = None


def attention_layout(trunk: Any, rows: PackedRows, *, dtype: torch.dtype) -> AttentionLayout:
    """Compute the layout of rows that begin with a prompt; `dtype` is that of hidden states."""
    segment, (first_read, n_causal) = rows.segment, rows.get_extent()
    sincos = trunk.h[0].attn.embed_positions  # [positions, rotary], sines then cosines
    sin, cos = sincos.to(segment.device).float()[rows.positions].chunk(2, dim=-1)
    rotations = torch.complex(cos, sin)[:, :, None]
    if rows.in_blocks:
        blocks = _block_masks(rows, first_read)
        return AttentionLayout(first_read, n_causal, None, rotations, blocks=blocks)
    seen = visibility(rows)
    # On CPUs the backward pass of torch's fused kernel takes up to three times as long.
    chunked = devices.trains_on_cpu(segment) and segment.shape[1] <= LONGEST_CHUNKED
    if chunked and n_causal == segment.shape[1]:
        seen = torch.ones_like(seen[:1]).tril()
    seen = seen[:, None, 0 if chunked else first_read // KERNEL_BLOCK * KERNEL_BLOCK :]
    return AttentionLayout(first_read, n_causal, additive(seen, dtype), rotations, chunked)


def _block_masks(rows: PackedRows, first: int) -> tuple[BlockMask, BlockMask]:
    """Masks of all positions of rows, and of those from `first` on as queries."""
    (n_rows, length), device = rows.segment.shape, rows.segment.device
    offset = torch.full((), first, device=device)  # as a number, each would be compiled anew

    def seen(row: Any, _head: Any, query: Any, key: Any) -> Any:
        return rows.can_see(row, query, key)

    def seen_by_last(row: Any, _head: Any, query: Any, key: Any) -> Any:
        return rows.can_see(row, query + offset, key)

    return (
        block_mask(seen, n_rows, length, length, device),
        block_mask(seen_by_last, n_rows, length - first, length, device),
    )


def use_packed_blocks(trunk: Any) -> None:
    """Make the blocks of a GPT-J accept a layout of packed rows; without one they are unchanged."""
    for block in trunk.h:
        block.__class__ = PackedBlock
        block.attn.__class__ = PackedBlockAttention


def run_trunk(trunk: Any, hidden: Tensor, layout: AttentionLayout) -> Tensor:
    """Compute last hidden states [R, L, d] from input embeddings; zero before `layout.first_read`."""
    hidden = trunk.drop(hidden)
    for block in trunk.h:
        hidden = block(hidden, layout=layout, is_last=block is trunk.h[-1])[0]
    hidden = trunk.ln_f(hidden)
    return nn.functional.pad(hidden, (0, 0, layout.first_read, 0))


class PackedBlockAttention(GPTJAttention):
    """GPT-J's attention, which computes packed rows if a layout is given."""

    def _get_embed_positions(self, position_ids: Tensor) -> Tensor:
        """Return the rotations of all positions, [N, positions, rotary], as a view of one table."""
        table = self.embed_positions.to(position_ids.device)
        return table.expand(len(position_ids), -1, -1)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        layout: AttentionLayout | None = None,
        **kwargs: Any,
    ) -> Any:
        if layout is None:
            return super().forward(hidden_states, *args, **kwargs)
        return self.attend_packed(hidden_states, layout, **kwargs), None

    def attend_packed(self, normed: Tensor, layout: AttentionLayout, *, first: int = 0) -> Tensor:
        """Compute self-attention of the positions from `first` on, [R, L, d] -> [R, L - first, d]."""
        read = normed[:, first:]
        query, key, value = (
            projection(states).unflatten(-1, (self.num_attention_heads, self.head_dim))
            for projection, states in (
                (self.q_proj, read),
                (self.k_proj, normed),
                (self.v_proj, normed),
            )
        )  # (R, L, H, d / H)
        query = rotate(query, layout.rotations[:, first:], self.rotary_dim).transpose(1, 2)
        key = rotate(key, layout.rotations, self.rotary_dim).transpose(1, 2)  # (R, H, L, d / H)
        dropout = self.attn_dropout.p if self.training else 0.0
        heads = attend(query, key, value.transpose(1, 2), layout, dropout)
        return self.resid_dropout(self.out_proj(heads.flatten(2)))


class PackedBlock(GPTJBlock):
    """GPT-J's block x + attention(LN(x)) + MLP(LN(x)), for packed rows if a layout is given."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *args: Any,
        layout: AttentionLayout | None = None,
        is_last: bool = False,
        **kwargs: Any,
    ) -> Any:
        if layout is None:
            return super().forward(hidden_states, *args, **kwargs)
        first = layout.first_read if is_last else 0
        normed = self.ln_1(hidden_states)  # (R, L, d)
        attended, _ = self.attn(normed, layout=layout, first=first)
        inner = self.mlp.fc_in(normed[:, first:])
        is_gelu = self.attn.config.activation_function in GELU_TANH
        inner = tanh_gelu(inner) if is_gelu else self.mlp.act(inner)
        fed = self.mlp.dropout(self.mlp.fc_out(inner))
        return (hidden_states[:, first:] + attended + fed,)


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, dropout: float
) -> Tensor:
    """Compute softmax(Q K^T / sqrt(d / H) + mask) V with Q [R, H, M, d / H], K and V [R, H, L, d / H].

    The naive twin is torch's attention with one mask.

    Returns:
        [R, M, H, d / H].
    """
    if layout.blocks is not None:
        mask = layout.blocks[0 if query.shape[2] == key.shape[2] else 1]
        training = torch.is_grad_enabled()
        return attend_in_blocks(query, key, value, mask, training=training).transpose(1, 2)
    assert layout.mask is not None
    if layout.chunked and dropout == 0:
        return ChunkedAttention.apply(query, key, value, layout.mask, layout.n_causal)
    return _attend_by_kernel(query, key, value, layout, dropout)


def _attend_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, dropout: float
) -> Tensor:
    """Compute `attend` by torch's fused kernel.

    Positions before `layout.n_causal` need no mask, unless only some positions are queries. Their
    number is rounded down to a multiple of `KERNEL_BLOCK`, since torch's CPU kernel is half as fast
    otherwise.
    """
    assert layout.mask is not None
    attend = partial(scaled_dot_product_attention, dropout_p=dropout)
    reads_all = query.shape[2] == key.shape[2]
    n_causal = layout.n_causal // KERNEL_BLOCK * KERNEL_BLOCK if reads_all else 0
    n_masked = query.shape[2] - n_causal
    causal, masked = query.split([n_causal, n_masked], dim=2)
    found = []
    if n_causal > 0:
        keys, values = key[:, :, :n_causal], value[:, :, :n_causal]
        found.append(attend(causal, keys, values, is_causal=True))
    if n_masked > 0:
        found.append(attend(masked, key, value, attn_mask=layout.mask[:, :, -n_masked:]))
    heads = [one.transpose(1, 2) for one in found]
    return heads[0] if len(heads) == 1 else torch.cat(heads, dim=1)


def rotate(heads: Tensor, rotations: Tensor, rotary_dim: int | None) -> Tensor:
    """Apply rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34) to adjacent pairs of dimensions.

    Args:
        heads: [R, L, H, d / H]. rotations: [R, L, 1, rotary / 2] complex64.
        rotary_dim: number of dimensions that are rotated, None for all.
    """
    width = heads.shape[-1] if rotary_dim is None else rotary_dim
    pairs = torch.view_as_complex(heads[..., :width].float().unflatten(-1, (-1, 2)))
    found = torch.view_as_real(pairs * rotations).flatten(-2).to(heads.dtype)
    return found if width == heads.shape[-1] else torch.cat([found, heads[..., width:]], dim=-1)
