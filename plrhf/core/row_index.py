"""What the CPU reads off the rows of a batch, so that a GPU is never asked for it.

A GPU works behind the program. Asked for a number, such as how many tokens a batch's responses have, it
would first have to end all its work, and then wait for more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from plrhf.core.types import CHOSEN, PADDING, PROMPT, REJECTED


class Extent(NamedTuple):
    """How far some rows need neither their outputs read nor a mask.

    Attributes:
        first_read: nobody reads the outputs of positions before it: they are prompt in every row.
        n_causal: the first positions that see all before them in every row; >= `first_read`.
    """

    first_read: int
    n_causal: int

    def behind(self, n_vectors: int) -> Extent:
        """The extent of the same rows with `n_vectors` more positions of prompt in front."""
        return Extent(self.first_read + n_vectors, self.n_causal + n_vectors)


def extent_of(segment: Tensor, owner: Tensor | None = None, branch: Tensor | None = None) -> Extent:
    """Find the extent of rows of segments [R, L]; owner and branch are those of `masks.PackedRows`.

    Its naive twin counts what `masks.sees` lets each position see.
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

    That is the position before it. The one exception is the first token of a response that does not
    directly follow the prompt (the rejected one in a packed row): the prompt's last position predicts it.
    """
    before = torch.arange(segment.shape[1], device=segment.device).expand_as(segment) - 1
    starts = torch.ones_like(segment, dtype=torch.bool)
    starts[:, 1:] = segment[:, 1:] != segment[:, :-1]
    prompt_end = (segment == PROMPT).sum(dim=1, keepdim=True) - 1
    return torch.where(starts, prompt_end, before).clamp(min=0)


@dataclass
class RowIndex:
    """Where the response tokens of R rows of text stand, and how far the rows need no mask.

    Attributes:
        row, column: [N] int64, of each of the N response tokens.
        before: [N] int64, column of the position whose hidden state predicts it.
        extent: of the rows as they are, user vectors not counted.
    """

    row: Tensor
    column: Tensor
    before: Tensor
    extent: Extent

    @classmethod
    def of(cls, segment: Tensor) -> Self:
        """Make the index of rows with segments [R, L]; on a GPU the program waits for it."""
        row, column = ((segment == CHOSEN) | (segment == REJECTED)).nonzero(as_tuple=True)
        return cls(row, column, predecessors(segment)[row, column], extent_of(segment))
