"""GPT-J's trunk on packed rows: its weights, fewer operations. transformers' own is the naive twin.

What is spared: attention over pairs of positions that never see each other, the last block's work on
positions nobody reads, rotations recomputed in every block, and intermediates of the activation.
When text is written, a token at a time, it is a copy of all rotations for every row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from plrhf.backbone.lora import product_dtype
from plrhf.core.types import PADDING, PROMPT, is_planned

BLOCK = 32
"""Positions that torch's fused attention on CPUs takes at a time."""

AT_ONCE = 128
"""Positions whose attention is computed at a time where that is done by products."""

BY_PRODUCTS = 2048
"""Longest rows whose attention trains by products, on CPUs: the weights it keeps take no more room
than all else that is kept of a block, with heads of 64."""

GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")
"""Names of one function; the first is written in five operations, of which torch has one."""


@dataclass
class Packed:
    """How the positions of a batch see one another, for all blocks.

    Attributes:
        start: nobody reads what comes out of positions before it: they are prompt in every row.
        n_causal: so many positions, from the first, see all before them in every row; >= `start`.
        mask: [R, 1, M, L] additive, what each of the last M positions sees, those from `start` and
            the rest of its `BLOCK`; all of them where `by_products`, and [1, 1, L, L] where each sees
            all before it.
        turns: [R, L, 1, rotary / 2] complex64, each position's rotation.
        by_products: attend by products, the mask for all.
    """

    start: int
    n_causal: int
    mask: Tensor
    turns: Tensor
    by_products: bool


def packed(
    trunk: Any, segment: Tensor, position_ids: Tensor, sees: Tensor, *, dtype: torch.dtype
) -> Packed:
    """`Packed` of rows that begin with a prompt.

    Args:
        segment, position_ids: [R, L] int64. sees: [R, L, L] bool, whether a position sees another.
        dtype: of hidden states.
    """
    # One short of the shortest prompt: its last position is what predicts a response's first token.
    start = max(0, int((segment == PROMPT).cumprod(dim=1).sum(dim=1).min()) - 1)
    # Padding may see anything, as nobody sees it: chosen responses need no mask, alone or after
    # prompts of one length, nor does anything in a row of one response.
    n_before = torch.arange(1, segment.shape[1] + 1, device=segment.device)
    is_causal = (sees.sum(dim=2) == n_before) | (segment == PADDING)  # [R, L]
    n_causal = int(is_causal.all(dim=0).cumprod(dim=0).sum())
    product = product_dtype(segment.device, dtype)
    # torch's fused backward pass takes up to three times as long on CPUs, most so in bfloat16. What a
    # plan is for is a GPU.
    on_cpu = segment.is_cpu and not is_planned(segment)
    by_products = on_cpu and torch.is_grad_enabled() and segment.shape[1] <= BY_PRODUCTS
    if by_products and n_causal == segment.shape[1]:
        sees = torch.ones_like(sees[:1]).tril()
    seen = sees[:, None, 0 if by_products else start // BLOCK * BLOCK :]
    mask = torch.zeros(seen.shape, dtype=product, device=seen.device)
    sincos = trunk.h[0].attn.embed_positions  # [positions, rotary], sines then cosines
    sin, cos = sincos.to(segment.device).float()[position_ids].chunk(2, dim=-1)
    turns = torch.complex(cos, sin)[:, :, None]
    return Packed(start, n_causal, mask.masked_fill_(~seen, -torch.inf), turns, by_products)


def run(trunk: Any, hidden: Tensor, layout: Packed) -> Tensor:
    """Last hidden states [R, L, d] from input embeddings; zeros before `layout.start`."""
    hidden = trunk.drop(hidden)
    for block in trunk.h:
        hidden = block(hidden, packed=layout, is_last=block is trunk.h[-1])[0]
    hidden = trunk.ln_f(hidden)
    return nn.functional.pad(hidden, (0, 0, layout.start, 0))


def adopt(trunk: Any) -> None:
    """Teach the blocks of a GPT-J to take packed rows; without them they do what they did."""
    for block in trunk.h:
        block.forward = MethodType(_taking_packed(block.forward), block)
        block.attn._get_embed_positions = MethodType(_rotations, block.attn)


def _rotations(self: Any, position_ids: Tensor) -> Tensor:
    """Rotations of all positions, the same ones for each row: [N, positions, rotary], a view."""
    table = self.embed_positions.to(position_ids.device)
    return table.expand(len(position_ids), -1, -1)


def _taking_packed(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        hidden: Tensor,
        *,
        packed: Packed | None = None,
        is_last: bool = False,
        **others: Any,
    ) -> Any:
        if packed is None:
            return original(hidden, **others)
        step = partial(block_forward, self, layout=packed, is_last=is_last)
        if self.gradient_checkpointing and self.training:
            return (self._gradient_checkpointing_func(step, hidden),)
        return (step(hidden),)

    return forward


def block_forward(block: Any, hidden: Tensor, layout: Packed, *, is_last: bool) -> Tensor:
    """x + attention(LN(x)) + MLP(LN(x)); the last block: from `layout.start` on only."""
    first = layout.start if is_last else 0
    normed = block.ln_1(hidden)  # (R, L, d)
    read = normed[:, first:]
    attended = attention(block.attn, normed, read, layout)
    inner = block.mlp.fc_in(read)
    inner = gelu(inner, approximate="tanh") if _is_gelu(block) else block.mlp.act(inner)
    fed = block.mlp.dropout(block.mlp.fc_out(inner))
    return hidden[:, first:] + attended + fed


def attention(attn: Any, normed: Tensor, read: Tensor, layout: Packed) -> Tensor:
    """Self-attention of the positions `read` (all, or those from `layout.start` on) over all."""
    n_heads = attn.num_attention_heads
    query, key, value = (
        project(given).unflatten(-1, (n_heads, attn.head_dim))  # (R, L, H, d / H)
        for project, given in ((attn.q_proj, read), (attn.k_proj, normed), (attn.v_proj, normed))
    )
    first = normed.shape[1] - read.shape[1]
    query = turned(query, layout.turns[:, first:], attn.rotary_dim).transpose(1, 2)
    key = turned(key, layout.turns, attn.rotary_dim).transpose(1, 2)  # (R, H, L, d / H)
    value = value.transpose(1, 2)
    dropout = attn.attn_dropout.p if attn.training else 0.0
    heads = attend(query, key, value, layout, dropout)
    return attn.resid_dropout(attn.out_proj(heads.flatten(2)))


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Packed, dropout: float) -> Tensor:
    """softmax(Q K^T / sqrt(d / H) + mask) V of [R, H, M, d / H] over [R, H, L, d / H].

    The naive twin is torch's own attention with a mask for all.

    Returns:
        [R, M, H, d / H].
    """
    if layout.by_products and dropout == 0:
        return _ByProducts.apply(query, key, value, layout.mask, layout.n_causal)
    return _attend_fused(query, key, value, layout, dropout)


def _attend_fused(
    query: Tensor, key: Tensor, value: Tensor, layout: Packed, dropout: float
) -> Tensor:
    """`attend` by torch's kernel.

    Only positions from `layout.n_causal` on are given a mask (from the multiple of `BLOCK` before it,
    as torch's CPU kernel takes twice as long otherwise), and all of those read where some are not.
    """
    attend = partial(scaled_dot_product_attention, dropout_p=dropout)
    reads_all = query.shape[2] == key.shape[2]
    n_causal = layout.n_causal // BLOCK * BLOCK if reads_all else 0
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


class _ByProducts(torch.autograd.Function):
    """`attend` by matrix products, `AT_ONCE` queries at a time over the keys up to their last.

    So nearly half of the products are spared, and a piece of the scores is still in the cache when it
    is next read. Of positions that see all before them only the products with their own piece's keys
    take the mask. Weights [R, H, M, L] are kept for the backward pass, as far as they are computed.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, n_causal: int
    ) -> Tensor:
        n_read, width = query.shape[2:]
        ctx.scale, ctx.outer = width**-0.5, query.shape[:2]
        mask = mask[:, :, mask.shape[2] - n_read :]  # (R, 1, M, L)
        query, key, value = (one.flatten(0, 1) for one in (query * ctx.scale, key, value))
        weights, heads = [], []
        for start, stop, seen in _pieces(n_read, key.shape[1]):
            scores = query[:, start:stop] @ key[:, :seen].transpose(1, 2)  # (RH, m, l)
            own = seen - (stop - start) if seen <= n_causal else 0
            scores.unflatten(0, ctx.outer)[..., own:].add_(mask[:, :, start:stop, own:seen])
            weights.append(scores.softmax(dim=-1))
            heads.append(weights[-1] @ value[:, :seen])
        ctx.save_for_backward(query, key, value, *weights)
        return _joined(heads, ctx.outer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *weights = ctx.saved_tensors
        d_heads = grads[0].transpose(1, 2).flatten(0, 1)  # (RH, M, d / H)
        d_queries: list[Tensor] = []
        d_key = d_value = torch.empty(0)
        pieces = _pieces(query.shape[1], key.shape[1])
        for (start, stop, seen), weight in reversed(list(zip(pieces, weights, strict=True))):
            given = d_heads[:, start:stop]
            d_weight = given @ value[:, :seen].transpose(1, 2)
            d_scores = torch._softmax_backward_data(d_weight, weight, -1, weight.dtype)
            d_queries.insert(0, d_scores @ key[:, :seen])
            to_value = weight.transpose(1, 2) @ given
            to_key = d_scores.transpose(1, 2) @ query[:, start:stop]
            if stop == query.shape[1]:  # the first one here, which sees all keys
                d_key, d_value = to_key, to_value
            else:
                d_key[:, :seen] += to_key
                d_value[:, :seen] += to_value
        d_query = _joined(d_queries, ctx.outer).mul_(ctx.scale).transpose(1, 2)
        return d_query, d_key.unflatten(0, ctx.outer), d_value.unflatten(0, ctx.outer), None, None


def _joined(pieces: list[Tensor], outer: torch.Size) -> Tensor:
    """Pieces [RH, m, d / H], one after the other, as [R, M, H, d / H]."""
    return torch.cat([one.unflatten(0, outer).transpose(1, 2) for one in pieces], dim=1)


def _pieces(n_read: int, length: int) -> list[tuple[int, int, int]]:
    """First and last + 1 of the queries taken together, and how many of the keys those can see.

    Args:
        n_read: queries, of the last of `length` positions.
    """
    stops = [min(start + AT_ONCE, n_read) for start in range(0, n_read, AT_ONCE)]
    starts = [0, *stops[:-1]]
    return [(a, b, length - n_read + b) for a, b in zip(starts, stops, strict=True)]


def turned(heads: Tensor, turns: Tensor, rotary_dim: int | None) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34) on neighbouring pairs of dimensions.

    Args:
        heads: [R, L, H, d / H]. turns: [R, L, 1, rotary / 2] complex64. rotary_dim: how many turn.
    """
    width = heads.shape[-1] if rotary_dim is None else rotary_dim
    pairs = torch.view_as_complex(heads[..., :width].float().unflatten(-1, (-1, 2)))
    found = torch.view_as_real(pairs * turns).flatten(-2).to(heads.dtype)
    return found if width == heads.shape[-1] else torch.cat([found, heads[..., width:]], dim=-1)


def _is_gelu(block: Any) -> bool:
    return block.attn.config.activation_function in GELU_TANH
