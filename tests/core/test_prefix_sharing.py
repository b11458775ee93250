"""Rows that share what their texts begin with, against rows computed one by one."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import USERS, assert_same, gradients, make_backbone, make_batch, make_model, perturb
from torch import Tensor

from plrhf.backbone.masks import PackedRows, visibility
from plrhf.core.prefix_sharing import share_prefixes
from plrhf.core.types import PreferenceBatch
from plrhf.data.packing import TokenPair, packed, two_rows
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel

END = 0


def tokens(draw: random.Random, n: int) -> tuple[int, ...]:
    return tuple(draw.randrange(1, 90) for _ in range(n))


def conversation(n_turns: int, *, length: int = 7, seed: int = 0) -> list[TokenPair]:
    """A pair at each turn, whose prompt is all that was said before, chosen replies included."""
    draw, prompt, pairs = random.Random(seed), (), []
    for _ in range(n_turns):
        prompt += tokens(draw, length)
        chosen, rejected = ((*tokens(draw, length - 1), END) for _ in range(2))
        pairs.append(TokenPair(prompt, chosen, rejected))
        prompt += chosen
    return pairs


def ranking(k: int, *, seed: int = 1) -> list[TokenPair]:
    """All pairs of a ranking of k responses of unequal lengths."""
    draw = random.Random(seed)
    prompt = tokens(draw, 5)
    responses = [(*tokens(draw, 2 + place), END) for place in range(k)]
    return [
        TokenPair(prompt, responses[i], responses[j]) for i in range(k) for j in range(i + 1, k)
    ]


PAIRS = [*conversation(3), *ranking(3), TokenPair((5, 6), (7, 8, 0), (7, 9, 0))]
TREES = [0, 0, 0, 1, 1, 1, 2]
OWNERS = [1, 1, 1, 2, 2, 2, 3]


def shared(batch: PreferenceBatch, trees: list[Any], n_vectors: int = 0) -> PreferenceBatch:
    packing = share_prefixes(batch.input_ids, batch.segment, trees, n_vectors=n_vectors)
    return replace(batch, packing=packing)


def test_by_hand() -> None:
    # 5 6 | 7 8 0 | 7 9 0: the responses share their first token, so the tree is 5 6 7 (8 0) (9 0).
    batch = shared(make_batch([PAIRS[-1]], padding=2), [0])
    packing = batch.packing
    assert packing is not None and packing.until is not None
    assert packing.pack(batch.input_ids).tolist() == [[5, 6, 7, 8, 0, 9, 0]]
    assert packing.pack(batch.position_ids).tolist() == [[0, 1, 2, 3, 4, 3, 4]]
    assert packing.until.tolist() == [[6, 6, 6, 4, 4, 6, 6]]
    assert packing.read_target.tolist() == [0, 1, 2, 3, 4, 2, 5, 6]
    assert packing.extent == (1, 5)


@pytest.mark.parametrize("n_vectors", [0, 2])
def test_a_position_sees_its_own_text_alone(n_vectors: int) -> None:
    batch = make_batch(PAIRS)
    packing = share_prefixes(batch.input_ids, batch.segment, TREES, n_vectors=n_vectors)
    assert packing.until is not None and packing.extent is not None
    ids = torch.nn.functional.pad(batch.input_ids, (n_vectors, 0), value=-7)
    segment = torch.nn.functional.pad(batch.segment, (n_vectors, 0), value=0)
    packed_ids, marks = packing.pack(ids), packing.pack(segment, -1)
    seen = visibility(PackedRows(marks, marks, until=packing.until))
    where = dict(zip(packing.read_source.tolist(), packing.read_target.tolist(), strict=True))
    length = ids.shape[1]
    for row, pair in enumerate(PAIRS):
        columns = [at for at in range(length) if segment[row, at] != -1]
        texts = [[at for at in columns if segment[row, at] in (0, mark)] for mark in (1, 2)]
        for text, response in zip(texts, (pair.chosen, pair.rejected), strict=True):
            expected = [-7] * n_vectors + [*pair.prompt, *response]
            for n, at in enumerate(text, 1):
                place, column = divmod(where[row * length + at], packing.packed_length)
                assert packed_ids[place][seen[place, column]].tolist() == expected[:n]
    before = torch.arange(packing.packed_length) + 1
    causal = ((seen.sum(dim=2) == before) | (marks == -1)).all(dim=0).cumprod(0).sum()
    assert packing.extent.n_causal == causal
    assert packing.extent.first_read == 1 + n_vectors  # the shortest prompt has two tokens


def losses_and_gradients(model: Any, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss, _ = model.loss(batch)
    loss.sum().backward()
    return loss.detach(), {name: one.clone() for name, one in gradients(model).items()}


@pytest.mark.parametrize(
    ("kind", "aggregator", "backbone"),
    [
        (PersonalRewardModel, "film_last", "gptj"),
        (PersonalRewardModel, "film_last", "llama"),
        (PersonalRewardModel, "soft_prompt", "llama"),
        (PersonalDPOPolicy, "soft_prompt", "gptj"),
    ],
)
def test_shared_rows_equal_separate_ones(kind: Any, aggregator: str, backbone: str) -> None:
    model = make_model(kind, aggregator=aggregator, backbone=make_backbone(backbone))
    perturb(model, "to_film")
    apart = make_batch(PAIRS, layout=two_rows, users=OWNERS, slots=None)
    apart = replace(apart, ref_logps=torch.zeros(7, 2))
    batch = make_batch(PAIRS, layout=packed, users=OWNERS, slots=None)
    n_vectors = 3 if aggregator == "soft_prompt" else 0
    together = shared(replace(batch, ref_logps=torch.zeros(7, 2)), TREES, n_vectors)
    found = losses_and_gradients(model, together)
    assert model.backbone.layout == "packed"
    naive = make_model(kind, aggregator=aggregator, backbone=make_backbone(backbone))
    perturb(naive, "to_film")
    naive.load_state_dict(model.state_dict())
    naive.backbone.layout = "two_rows"
    expected = losses_and_gradients(naive, apart)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
    assert_same(found[1], expected[1], atol=1e-5)


def test_a_conversation_of_eight_turns_takes_a_third_of_the_tokens() -> None:
    pairs = conversation(8, length=12)
    batch = make_batch(pairs, users=[1] * 8)
    packing = share_prefixes(batch.input_ids, batch.segment, [0] * 8)
    n_packed_rows = int((batch.segment != -1).sum())  # prompt | chosen | rejected, one row a pair
    assert n_packed_rows / len(packing.source) >= 3.0
    n_separate = sum(2 * len(one.prompt) + len(one.chosen) + len(one.rejected) for one in pairs)
    assert n_separate / len(packing.source) >= 5.0
    assert len(packing.source) == 8 * 3 * 12


def test_a_ranking_takes_each_response_once() -> None:
    pairs = ranking(5)
    batch = make_batch(pairs, users=[USERS[0]] * 10)
    packing = share_prefixes(batch.input_ids, batch.segment, [0] * 10)
    assert len(packing.source) == 5 + sum(3 + place for place in range(5))
