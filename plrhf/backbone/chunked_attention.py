"""Attention by plain matrix products on chunks of the queries, which trains faster on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plrhf.core.second_order import check_differentiated_once

CHUNK = 128
"""Number of queries in a chunk."""


class ChunkedAttention(torch.autograd.Function):
    """Computes softmax(Q K^T / sqrt(d / H) + mask) V for chunks of `CHUNK` queries.

    Each chunk uses only the keys up to its last query, which saves nearly half of the products, and its
    scores stay in the CPU's cache. The attention weights are kept for the backward pass. The naive twin
    is torch's attention with one mask.

    Args:
        query: [R, H, M, d / H], the last M of L positions. key, value: [R, H, L, d / H].
        mask: [R or 1, 1, L, L], added to the scores.
        n_causal: number of leading positions that see all positions before them in every row. For them,
            only the products with the keys of their own chunk need the mask.

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
        for start, stop, n_keys in query_chunks(n_queries, key.shape[1]):
            scores = query[:, start:stop] @ key[:, :n_keys].transpose(1, 2)  # (RH, m, l)
            own = n_keys - (stop - start) if n_keys <= n_causal else 0
            scores.unflatten(0, ctx.outer)[..., own:].add_(mask[:, :, start:stop, own:n_keys])
            weights.append(scores.softmax(dim=-1))
            heads.append(weights[-1] @ value[:, :n_keys])
        ctx.save_for_backward(query, key, value, *weights)
        return _join_chunks(heads, ctx.outer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_differentiated_once()
        query, key, value, *weights = ctx.saved_tensors
        d_heads = grads[0].transpose(1, 2).flatten(0, 1)  # (RH, M, d / H)
        d_queries: list[Tensor] = []
        d_key = d_value = torch.empty(0)
        of_chunks = zip(query_chunks(query.shape[1], key.shape[1]), weights, strict=True)
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
        d_query = _join_chunks(d_queries, ctx.outer).mul_(ctx.scale).transpose(1, 2)
        return d_query, d_key.unflatten(0, ctx.outer), d_value.unflatten(0, ctx.outer), None, None


def _join_chunks(of_chunks: list[Tensor], outer: torch.Size) -> Tensor:
    """Join chunks [R * H, m, d / H] along the positions, to [R, M, H, d / H]."""
    return torch.cat([one.unflatten(0, outer).transpose(1, 2) for one in of_chunks], dim=1)


def query_chunks(n_queries: int, length: int) -> list[tuple[int, int, int]]:
    """Return for each chunk: first query, last query + 1, and the number of keys it sees.

    Args:
        n_queries: the queries are the last so many of `length` positions.
    """
    stops = [min(start + CHUNK, n_queries) for start in range(0, n_queries, CHUNK)]
    starts = [0, *stops[:-1]]
    return [(a, b, length - n_queries + b) for a, b in zip(starts, stops, strict=True)]
