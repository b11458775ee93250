"""Options of text generation for each row of a batch of its own, through hooks of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """Samples each row with its own temperature, top_p and seed.

    It adds Gumbel noise to log p and masks tokens outside the nucleus. The largest sum is then a sample
    of p (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030), so `generate` chooses greedily. A row's
    tokens do not depend on the other rows of its batch.

    Args:
        rows: options of N rows, in order.
    """

    def __init__(self, rows: Sequence[Sampling], device: torch.device) -> None:
        self.temperature = torch.tensor([row.temperature for row in rows], device=device)
        self.top_p = torch.tensor([row.top_p for row in rows], device=device)
        self.sampled = [n for n, row in enumerate(rows) if row.temperature > 0]
        # On the CPU, so that a seed gives the same text on every device.
        self.generators = [torch.Generator().manual_seed(rows[n].seed) for n in self.sampled]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self.sampled) == 0:
            return scores
        own = torch.tensor(self.sampled, device=scores.device)
        logps = (scores[own].float() / self.temperature[own, None]).log_softmax(dim=-1)
        logps = within_nucleus(logps, self.top_p[own])
        draws = [torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators]
        noise = -torch.stack(draws).log()  # -log Exp(1) is Gumbel
        return scores.float().index_copy(0, own, logps + noise.to(scores.device))


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
    rows: Sequence[Sampling], hear: Hear, device: torch.device
) -> dict[str, LogitsProcessorList | StoppingCriteriaList]:
    """Return arguments of transformers' `generate` for rows with their own options."""
    return {
        "logits_processor": LogitsProcessorList([RowSampler(rows, device)]),
        "stopping_criteria": StoppingCriteriaList([RowListener(hear)]),
    }
