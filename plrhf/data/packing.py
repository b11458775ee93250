"""Token ids to tensors, in the packed layout (shared prompt) and in the two-row layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plrhf.core.types import CHOSEN, PADDING, PROMPT, REJECTED

LayoutName = Literal["packed", "two_rows"]
Layout = Callable[[Sequence["TokenPair"]], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class TokenPair:
    """Token ids of one pair. Responses end with the end token; either may be empty."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longer response."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def packed(pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor, Tensor]:
    """Put each pair into one row, ``prompt | chosen | rejected``. The naive twin is `two_rows`.

    Returns:
        input_ids, segment, position_ids, each [B, L] int64.
    """
    rows = []
    for pair in pairs:
        n_prompt, n_chosen, n_rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        segment = [PROMPT] * n_prompt + [CHOSEN] * n_chosen + [REJECTED] * n_rejected
        positions = [*range(n_prompt + n_chosen), *range(n_prompt, n_prompt + n_rejected)]
        rows.append(([*pair.prompt, *pair.chosen, *pair.rejected], segment, positions))
    return _pad(rows)


def two_rows(pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor, Tensor]:
    """Put each pair into two rows: ``prompt | chosen`` of all pairs, then ``prompt | rejected``.

    Returns:
        input_ids, segment, position_ids, each [2B, L] int64.
    """
    rows = []
    for name, mark in (("chosen", CHOSEN), ("rejected", REJECTED)):
        for pair in pairs:
            response = getattr(pair, name)
            ids = [*pair.prompt, *response]
            rows.append(
                (ids, [PROMPT] * len(pair.prompt) + [mark] * len(response), [*range(len(ids))])
            )
    return _pad(rows)


LAYOUTS: dict[LayoutName, Layout] = {"packed": packed, "two_rows": two_rows}


def _pad(rows: Sequence[tuple[list[int], list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad rows of (input_ids, segment, position_ids) to tensors."""
    length = max((len(ids) for ids, _, _ in rows), default=0)
    columns = []
    # Padding's token id is never looked at (segment says what it is), so 0 serves any tokenizer.
    for place, filler in enumerate((0, PADDING, 0)):
        filled = [row[place] + [filler] * (length - len(row[place])) for row in rows]
        columns.append(torch.tensor(filled, dtype=torch.int64).view(len(rows), length))
    return columns[0], columns[1], columns[2]
