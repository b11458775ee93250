"""Facts about the rows of a batch that the loader computes on the CPU, so that a GPU need not be read.

A GPU computes asynchronously. To read a number from it, such as the number of response tokens, the
program would have to wait for all queued work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from plrhf.core.types import CHOSEN, PADDING, PROMPT, REJECTED, Pinnable


class Extent(NamedTuple):
    """Which positions of some rows need no output and no mask.

    Attributes:
        first_read: outputs of positions before it are not used; they are prompt in every row.
        n_causal: number of first positions that see all positions before them in every row; >=
            `first_read`.
    """

    first_read: int
    n_causal: int

    def shifted_by(self, n_vectors: int) -> Extent:
        """Return the extent of the same rows with `n_vectors` further prompt positions in front."""
        return Extent(self.first_read + n_vectors, self.n_causal + n_vectors)


def extent_of(segment: Tensor, owner: Tensor | None = None, branch: Tensor | None = None) -> Extent:
    """Compute the extent of rows from their segments [R, L]; owner and branch are as in `masks.PackedRows`.

    The naive twin counts which positions each position sees by `masks.visibility`.
    """
    # One short of the shortest prompt: its last position predicts a response's first token.
    n_prompt = (segment == PROMPT).cumprod(dim=1).sum(dim=1)
    # Padding may see anything, as nobody sees it. So a chosen response needs no mask where all
    # prompts are of one length, and a row of one response needs none at all.
    is_other = (segment != PROMPT) & (segment != PADDING)
    n_other = is_other.cumsum(dim=1)
    causal = n_other == 0
    for mark in (CHOSEN, REJECTED):
        own = segment == mark
        causal |= own & (n_other == own.cumsum(dim=1))
    if owner is not None:
        causal &= owner == owner[:, :1]
    if branch is not None:
        causal &= branch <= 1  # the first context's stand right behind the prompt
    causal |= segment == PADDING
    shortest = int(n_prompt.min()) if len(segment) > 0 else 0
    n_causal = int(causal.all(dim=0).cumprod(dim=0).sum())
    return Extent(max(0, shortest - 1), n_causal)


def predecessors(segment: Tensor) -> Tensor:
    """Return the position whose hidden state predicts each token, [R, L] int64.

    This is the position before it, except for the first token of a response that does not directly
    follow the prompt (the rejected one in a packed row), which the prompt's last position predicts.
    """
    before = torch.arange(segment.shape[1], device=segment.device).expand_as(segment) - 1
    starts = torch.ones_like(segment, dtype=torch.bool)
    starts[:, 1:] = segment[:, 1:] != segment[:, :-1]
    prompt_end = (segment == PROMPT).sum(dim=1, keepdim=True) - 1
    return torch.where(starts, prompt_end, before).clamp(min=0)


@dataclass
class RowIndex(Pinnable):
    """Where the response tokens of R rows of text are, and which positions need no mask.

    Attributes:
        row, column: indices of each of the N response tokens, [N] int64.
        before: column of the position whose hidden state predicts it, [N] int64.
        extent: of the rows as they are, without user vectors.
    """

    row: Tensor
    column: Tensor
    before: Tensor
    extent: Extent

    @classmethod
    def of(cls, segment: Tensor) -> Self:
        """Compute the index of rows with segments [R, L]; on a GPU the program must wait."""
        row, column = ((segment == CHOSEN) | (segment == REJECTED)).nonzero(as_tuple=True)
        return cls(row, column, predecessors(segment)[row, column], extent_of(segment))
