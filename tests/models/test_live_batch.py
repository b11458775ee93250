"""Texts that join and leave a batch while others are written are what each is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_families import CAUSAL, lora_backbone
from tiny import AGGREGATORS, make_backbone, make_model
from torch import Tensor

from plrhf.aggregators import ConcatSoftPrompt, FiLM
from plrhf.models import live_batch
from plrhf.models.generation import left_padded, write_batch
from plrhf.models.live_batch import LiveBatch, can_join
from plrhf.models.policy import PersonalDPOPolicy

PROMPTS = [(5, 6, 7), (8,), (9, 11, 4, 3, 12, 6, 20), (5, 6, 7), (33, 2), (14, 15, 13, 2, 41)]
STARTS = (0, 0, 2, 3, 3, 9)  # steps at which they join, one when all others have left
LENGTHS = (4, 2, 5, 3, 6, 3)


class NoEnd:
    """A tokenizer without a token that ends texts."""

    eos_token_id, pad_token_id, chat_template = None, 0, None


def make_policy(kind: str, aggregator: Any) -> Any:
    if kind in ("gptj", "llama"):
        policy = make_model(PersonalDPOPolicy, backbone=make_backbone(kind), aggregator=aggregator)
    else:
        soft: Any = ConcatSoftPrompt(hidden_size=48, n_tokens=2)
        policy = make_model(
            PersonalDPOPolicy, backbone=lora_backbone(CAUSAL[kind]), aggregator=soft
        )
    policy.backbone.bare.generation_config.eos_token_id = None
    return policy.eval()


def alone(policy: Any, prompt: tuple[int, ...], user: Tensor, n: int) -> list[int]:
    ids, mask = left_padded([prompt])
    tokenizer: Any = NoEnd()
    return write_batch(policy, tokenizer, ids, mask, user[None], max_new_tokens=n)[0].tolist()


def together(policy: Any, users: Tensor) -> list[list[int]]:
    """Greedy tokens of all texts, which begin at STARTS."""
    batch, texts = LiveBatch[int](policy), [[] for _ in PROMPTS]

    def hear(rows: list[int], logits: Tensor) -> None:
        for row, token in zip(rows, logits.argmax(dim=1).tolist(), strict=True):
            texts[row].append(token)
        batch.leave([row for row in rows if len(texts[row]) == LENGTHS[row]])

    for step in range(14):
        new = [row for row, start in enumerate(STARTS) if start == step]
        if len(new) > 0:
            hear(new, batch.join(new, [PROMPTS[row] for row in new], users[new]))
        if len(batch) > 0:
            batch.make_room()
            logits = batch.step(
                torch.tensor([0 if r is None else texts[r][-1] for r in batch.rows])
            )
            live = [slot for slot, row in enumerate(batch.rows) if row is not None]
            hear([row for row in batch.rows if row is not None], logits[live])
    assert len(batch) == 0 and batch.cache is None
    return texts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more_columns", "call_tokens"),
    [(1, 0), (64, 256)],  # moved at each token, equal prompts read once; never
)
@pytest.mark.parametrize(
    ("kind", "aggregator"),
    [*((kind, one) for kind in ("gptj", "llama") for one in AGGREGATORS), ("opt", "soft_prompt")],
)
@torch.no_grad()
def test_texts_are_those_written_alone(
    kind: str,
    aggregator: str,
    more_columns: int,
    call_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live_batch, "CALL_TOKENS", call_tokens)
    monkeypatch.setattr(live_batch, "MORE_COLUMNS", more_columns)
    policy = make_policy(kind, aggregator)
    assert can_join(policy)
    users = 3 * torch.randn(len(PROMPTS), policy.aggregator.user_dim)
    given = list(zip(PROMPTS, users, LENGTHS, strict=True))
    expected = [alone(policy, *one) for one in given]
    assert expected != [alone(policy, prompt, 0 * user, n) for prompt, user, n in given]
    assert together(policy, users) == expected


class Tanh(FiLM):
    """An aggregator from outside that changes how texts begin, and not how they go on."""

    def decoding(
        self, backbone: Any, input_ids: Tensor, attention_mask: Tensor, user: Tensor
    ) -> Any:
        return super().decoding(backbone, input_ids, attention_mask, user.tanh())


def test_models_whose_texts_cannot_join() -> None:
    assert not can_join(make_policy("mamba2", "soft_prompt"))  # a state, which would see padding
    policy = make_policy("llama", "film_last")
    assert can_join(policy)
    policy.aggregator = Tanh(hidden_size=32, n_blocks=3)
    assert not can_join(policy)
    policy.aggregator.continuing = lambda *_: None
    assert not can_join(policy)
