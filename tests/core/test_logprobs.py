"""Response log-probabilities: by hand, equal to the naive form, never all logits at once."""

from __future__ import annotations

from functools import partial
from math import log
from typing import Any

import pytest
import torch
from tiny import make_batch, make_pairs
from torch import Tensor, nn, tensor

from plrhf.core.logprobs import (
    naive_response_logps,
    response_logps,
    sum_by_response,
)
from plrhf.data.packing import packed, two_rows

VOCABULARY, WIDTH, N_PAIRS = 53, 11, 7


def test_sum_by_response_by_hand() -> None:
    values = tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    assert sum_by_response(values, tensor([[0, 1, 1, 2, -1]]), 1).tolist() == [[6.0, 8.0]]
    # Two rows a pair: rows 0 and 2 are pair 0, rows 1 and 3 pair 1.
    of_rows = tensor([[1.0, 2.0], [1.0, 4.0], [1.0, 8.0], [1.0, 16.0]])
    segment = tensor([[0, 1], [0, 1], [0, 2], [0, 2]])
    assert sum_by_response(of_rows, segment, 2).tolist() == [[2.0, 8.0], [4.0, 16.0]]


def test_response_logps_by_hand() -> None:
    # Two tokens, and hidden states that are logits: after the prompt 1/4, 3/4; after the first
    # token of chosen 4/5, 1/5. Chosen = (1, 0): 3/4 * 4/5 = 3/5; rejected = (0): 1/4.
    hidden = tensor([[[9.0, 1.0], [0.0, log(3)], [log(4), 0.0], [5.0, 5.0], [2.0, 7.0]]])
    segment = tensor([[0, 0, 1, 1, 2]])
    found = response_logps(
        hidden, tensor([[0, 1, 1, 0, 0]]), segment, nn.Identity(), n_pairs=1, constant=True
    )
    torch.testing.assert_close(found, tensor([[log(0.6), log(0.25)]]))


class Spy(nn.Module):
    """An unembedding that remembers how many logits it was asked for at once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, VOCABULARY)
        self.asked: list[tuple[int, ...]] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.asked.append(tuple(hidden.shape))
        return self.linear(hidden)


def run(
    logps: Any, layout: Any, *, frozen: bool, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None, Spy]:
    """Log-probabilities, and the gradients of a sum of them weighted unequally."""
    torch.manual_seed(0)
    unembed = Spy().requires_grad_(not frozen)
    batch = make_batch(make_pairs(N_PAIRS), layout=layout)
    ids = batch.input_ids % VOCABULARY
    hidden = torch.randn(*ids.shape, WIDTH, requires_grad=True)
    found = logps(hidden, ids, batch.segment, unembed, n_pairs=N_PAIRS, **options)
    (found * torch.arange(1.0, 1 + found.numel()).view_as(found)).sum().backward()
    assert hidden.grad is not None and (unembed.linear.weight.grad is None) == frozen
    return found.detach(), hidden.grad, unembed.linear.weight.grad, unembed


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_equals_the_naive_form(chunk_size: int, constant: bool) -> None:
    *naive, _ = run(naive_response_logps, two_rows, frozen=constant)
    *ours, _ = run(
        response_logps, two_rows, frozen=constant, constant=constant, chunk_size=chunk_size
    )
    torch.testing.assert_close(ours, naive, atol=1e-4, rtol=1e-5)


def test_packed_hidden_states_give_what_they_give_in_two_rows() -> None:
    pairs = make_pairs(N_PAIRS)
    joint, apart = make_batch(pairs), make_batch(pairs, layout=two_rows)
    of_token = torch.randn(97, 128, WIDTH)  # a hidden state a token and position

    def logps(batch: Any, function: Any) -> Tensor:
        hidden = of_token[batch.input_ids, batch.position_ids]
        ids = batch.input_ids % VOCABULARY
        return function(hidden, ids, batch.segment, unembed, n_pairs=N_PAIRS)

    unembed = Spy()
    found = logps(joint, partial(response_logps, constant=False))
    naive = logps(apart, naive_response_logps)
    torch.testing.assert_close(found, naive, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_never_more_logits_than_a_chunk_of_responses(chunk_size: int, constant: bool) -> None:
    kept: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape != (WIDTH, VOCABULARY):  # the weights
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        *_, spy = run(
            response_logps, packed, frozen=constant, constant=constant, chunk_size=chunk_size
        )
    n_tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in make_pairs(N_PAIRS))
    sizes = [size for size, _ in spy.asked]  # [N, d] each: no logits of whole rows
    assert max(sizes) <= chunk_size
    # Every response token once, and again in the backward pass of an unembedding that learns.
    assert sum(sizes) == (n_tokens if constant else 2 * n_tokens)
    assert all(shape[-1:] != (VOCABULARY,) or shape[0] <= chunk_size for shape in kept)
