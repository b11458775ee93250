"""Rows of one batch that are sampled each in its own way."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from tiny import make_backbone
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from plrhf.backbone.decoding import write_tokens
from plrhf.backbone.row_options import RowSampler, Sampling, row_options, within_nucleus

CPU = torch.device("cpu")


def sampling(temperature: float, top_p: float = 1.0, seed: int = 0) -> Sampling:
    return Sampling(temperature=temperature, top_p=top_p, seed=seed)


def test_the_nucleus_is_that_of_transformers() -> None:
    logits = 2 * torch.randn(5, 13)
    for top_p in (0.05, 0.5, 0.9):
        expected = TopPLogitsWarper(top_p)(None, logits.log_softmax(dim=-1))
        found = within_nucleus(logits.log_softmax(dim=-1), torch.full((5,), top_p))
        assert found.isinf().equal(expected.isinf())
    mixed = within_nucleus(logits.log_softmax(dim=-1), torch.tensor([1.0, 0.05, 1.0, 1.0, 1.0]))
    assert mixed.isinf().sum(dim=1).tolist() == [0, 12, 0, 0, 0]


def test_samples_have_the_distribution_that_was_asked() -> None:
    logits = torch.randn(1, 7)
    warped = TopPLogitsWarper(0.8)(None, TemperatureLogitsWarper(0.7)(None, logits))
    expected = warped.softmax(dim=-1)[0]
    n = 4000
    numbers = [Random(seed) for seed in range(n)]
    drawn = RowSampler([sampling(0.7, 0.8)] * n, numbers, CPU).choose(logits.expand(n, -1))
    shares = torch.bincount(drawn, minlength=7) / n
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt() + 1e-6).all()


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = torch.randn(3, 50)
    own = sampling(1.3, 0.9, seed=7)
    alone = RowSampler([own], [Random(7)], CPU)
    numbers = [Random(0), Random(7), Random(7)]
    among = RowSampler([sampling(0.0), own, sampling(0.2, 1.0)], numbers, CPU)
    for _ in range(5):
        three = among.choose(logits)
        assert alone.choose(logits[1:2]) == three[1]
        assert three[0] == logits[0].argmax()  # greedy


def test_a_token_outside_the_nucleus_is_never_drawn() -> None:
    class Most(Random):
        def random(self) -> float:
            return 1 - 2**-53  # the largest there is

    logits = torch.tensor([[1.0, 4.0, 2.0, -torch.inf]])
    assert RowSampler([sampling(1.0, 0.5)], [Most()], CPU).choose(logits) == 1
    assert RowSampler([sampling(1.0)], [Most()], CPU).choose(logits) == 2


@pytest.mark.slow
def test_a_batch_is_written_as_its_rows_alone() -> None:
    backbone = make_backbone().eval()
    ids = torch.randint(1, 90, (3, 5))
    rows = [sampling(0.0), sampling(1.0, seed=1), sampling(0.8, 0.7, seed=2)]

    def write(places: list[int], n_tokens: list[int]) -> list[list[int]]:
        heard: list[list[int]] = [[] for _ in places]

        def hear(tokens: list[int]) -> list[bool]:
            for own, token, most in zip(heard, tokens, n_tokens, strict=True):
                if len(own) < most:
                    own.append(token)
            return [len(own) == most for own, most in zip(heard, n_tokens, strict=True)]

        inputs: dict[str, Tensor] = {"input_ids": ids[places]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        how: dict[str, Any] = row_options([rows[place] for place in places], hear, CPU)
        with torch.no_grad():
            written = write_tokens(
                backbone, inputs, None, ends=[96], padding=0, max_new_tokens=9, of_rows=how
            )
        assert written.shape[1] == max(n_tokens)  # the batch ends with its last row
        return heard

    together = write([0, 1, 2], [3, 7, 5])
    assert [len(own) for own in together] == [3, 7, 5]
    assert together == [write([n], [most])[0] for n, most in enumerate((3, 7, 5))]
    with torch.no_grad():
        greedy = write_tokens(
            backbone,
            {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])},
            None,
            ends=[96],
            padding=0,
            max_new_tokens=3,
        )
    assert together[0] == greedy[0].tolist()
    assert math.isfinite(sum(together[1]))
