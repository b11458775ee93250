"""Pooling of a response's hidden states to one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plrhf.core.types import CHOSEN, PADDING, REJECTED


def pool_responses(hidden: Tensor, segment: Tensor, *, n_pairs: int, pooling: str) -> Tensor:
    """Pool hidden states to one vector a response: the last token's, or the mean over its tokens.

    Args:
        hidden: [C, R, L, d]. segment: [R, L] int64. n_pairs: B. pooling: "last" or "mean".

    Returns:
        [C, B, 2, d]: chosen, rejected.
    """
    weights = []
    for mark in (CHOSEN, REJECTED):
        member = segment == mark
        if pooling == "last":
            following = nn.functional.pad(segment, (0, 1), value=PADDING)[:, 1:]
            member = member & (following != mark)
        weights.append(member / member.sum(dim=1, keepdim=True).clamp(min=1))
    weight = torch.stack(weights, dim=1).to(hidden.dtype)  # [R, 2, L]
    of_row = weight @ hidden  # [C, R, 2, d]
    return of_row.unflatten(1, (-1, n_pairs)).sum(dim=1)
