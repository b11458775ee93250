"""Attention by plain matrix products, a chunk of the queries at a time: faster to train on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 128
"""Queries whose attention is computed at a time."""


class ChunkedAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(d / H) + mask) V, `CHUNK` queries at a time over the keys up to their last.

    The naive twin is torch's attention with a mask for all. Nearly half of the products are spared,
    and a chunk's scores are still in the cache when they are read next. The weights [R, H, M, L] are
    kept for the backward pass, as far as they are computed.

    Args:
        query: [R, H, M, d / H], of the last M of L positions. key, value: [R, H, L, d / H].
        mask: [R or 1, 1, L, L] additive.
        n_causal: the first positions that see all before them in every row. Only their products with
            the keys of their own chunk need the mask.

    Returns:
        [R, M, H, d / H].
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, n_causal: int
    ) -> Tensor:
        n_queries, width = query.shape[2:]
        ctx.scale, ctx.outer = width**-0.5, query.shape[:2]
        mask = mask[:, :, mask.shape[2] - n_queries :]  # (R, 1, M, L)
        query, key, value = (one.flatten(0, 1) for one in (query * ctx.scale, key, value))
        weights, heads = [], []
        for start, stop, n_keys in chunks(n_queries, key.shape[1]):
            scores = query[:, start:stop] @ key[:, :n_keys].transpose(1, 2)  # (RH, m, l)
            own = n_keys - (stop - start) if n_keys <= n_causal else 0
            scores.unflatten(0, ctx.outer)[..., own:].add_(mask[:, :, start:stop, own:n_keys])
            weights.append(scores.softmax(dim=-1))
            heads.append(weights[-1] @ value[:, :n_keys])
        ctx.save_for_backward(query, key, value, *weights)
        return _concatenated(heads, ctx.outer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *weights = ctx.saved_tensors
        d_heads = grads[0].transpose(1, 2).flatten(0, 1)  # (RH, M, d / H)
        d_queries: list[Tensor] = []
        d_key = d_value = torch.empty(0)
        of_chunks = zip(chunks(query.shape[1], key.shape[1]), weights, strict=True)
        for (start, stop, n_keys), weight in reversed(list(of_chunks)):
            d_chunk = d_heads[:, start:stop]
            d_weight = d_chunk @ value[:, :n_keys].transpose(1, 2)
            d_scores = torch._softmax_backward_data(d_weight, weight, -1, weight.dtype)
            d_queries.insert(0, d_scores @ key[:, :n_keys])
            to_value = weight.transpose(1, 2) @ d_chunk
            to_key = d_scores.transpose(1, 2) @ query[:, start:stop]
            if stop == query.shape[1]:  # the first one here, which sees all keys
                d_key, d_value = to_key, to_value
            else:
                d_key[:, :n_keys] += to_key
                d_value[:, :n_keys] += to_value
        d_query = _concatenated(d_queries, ctx.outer).mul_(ctx.scale).transpose(1, 2)
        return d_query, d_key.unflatten(0, ctx.outer), d_value.unflatten(0, ctx.outer), None, None


def _concatenated(of_chunks: list[Tensor], outer: torch.Size) -> Tensor:
    """Chunks [RH, m, d / H], one after the other, as [R, M, H, d / H]."""
    return torch.cat([one.unflatten(0, outer).transpose(1, 2) for one in of_chunks], dim=1)


def chunks(n_queries: int, length: int) -> list[tuple[int, int, int]]:
    """First query, last query + 1 and number of visible keys of each chunk.

    Args:
        n_queries: how many of the last of `length` positions are queries.
    """
    stops = [min(start + CHUNK, n_queries) for start in range(0, n_queries, CHUNK)]
    starts = [0, *stops[:-1]]
    return [(a, b, length - n_queries + b) for a, b in zip(starts, stops, strict=True)]
