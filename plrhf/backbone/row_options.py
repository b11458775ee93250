"""Options of text generation for each row of a batch of its own, through hooks of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

Hear = Callable[[list[int]], list[bool]]
"""Gets the newest token of every row, and says which rows have ended."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the tokens of one row are chosen.

    Attributes:
        temperature: 0 is greedy decoding. top_p: mass of nucleus sampling, in (0, 1].
        seed: of this row alone, from 0 to 2^63 - 1.
    """

    temperature: float
    top_p: float
    seed: int


class RowSampler(LogitsProcessor):
    """Samples each row with its own temperature, top_p and random numbers.

    A token is the first at which the summed probabilities exceed a uniform random number (inverse
    transform sampling), one number a token. A row's tokens do not depend on the other rows of its batch.

    Args:
        rows: options of N rows, in order. numbers: sources of random numbers of the rows; they are on the
            CPU, so that a seed gives the same text on every device.
    """

    def __init__(
        self, rows: Sequence[Sampling], numbers: Sequence[Random], device: torch.device
    ) -> None:
        sampled = [n for n, row in enumerate(rows) if row.temperature > 0]
        self.numbers = [numbers[n] for n in sampled]
        self.sampled = torch.tensor(sampled, dtype=torch.int64, device=device)
        self.temperature = torch.tensor([rows[n].temperature for n in sampled], device=device)
        self.top_p = torch.tensor([rows[n].top_p for n in sampled], device=device)

    def choose(self, scores: Tensor) -> Tensor:
        """Choose a token for each row from its logits, [N, V] -> [N] int64."""
        tokens = scores.argmax(dim=-1)
        if len(self.numbers) == 0:
            return tokens
        logps = (scores[self.sampled].float() / self.temperature[:, None]).log_softmax(dim=-1)
        mass = within_nucleus(logps, self.top_p).double().exp().cumsum(dim=-1)
        drawn = [[one.random()] for one in self.numbers]  # below 1
        level = torch.tensor(drawn, dtype=mass.dtype, device=mass.device) * mass[:, -1:]
        found = torch.searchsorted(mass, level, right=True)[:, 0]
        return tokens.index_copy(0, self.sampled, found)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.choose(scores)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def within_nucleus(logps: Tensor, top_p: Tensor) -> Tensor:
    """Set all but the most likely tokens whose mass reaches top_p to -inf, [N, V].

    Args:
        logps: normalised, [N, V]. top_p: [N]; rows with 1 stay as they are.
    """
    if bool((top_p >= 1).all()):
        return logps
    ordered, order = logps.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()  # mass of the more likely tokens
    outside = before >= top_p[:, None]
    outside[:, 0] = False
    outside &= top_p[:, None] < 1
    return logps.masked_fill(outside.scatter(1, order, outside), -torch.inf)


class RowListener(StoppingCriteria):
    """Tells a function the newest token of each row, and ends the rows it says have ended.

    Args:
        hear: called once for each step of the batch.
    """

    def __init__(self, hear: Hear) -> None:
        self.hear = hear

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        return torch.tensor(self.hear(input_ids[:, -1].tolist()), device=input_ids.device)


def row_options(
    rows: Sequence[Sampling], hear: Hear | None, device: torch.device
) -> dict[str, LogitsProcessorList | StoppingCriteriaList]:
    """Return arguments of transformers' `generate` for rows with their own options.

    Args:
        hear: see `RowListener`; None: nobody is told.
    """
    sampler = RowSampler(rows, [Random(row.seed) for row in rows], device)
    found: dict[str, Any] = {"logits_processor": LogitsProcessorList([sampler])}
    if hear is not None:
        found["stopping_criteria"] = StoppingCriteriaList([RowListener(hear)])
    return found
