"""Texts of every family begin as transformers' own plain forward continues them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from test_families import CAUSAL, REFUSED_HERE, lora_backbone, make_pairs
from torch import Tensor

from plrhf.aggregators import ConcatSoftPrompt, FiLM
from plrhf.backbone.model import Backbone
from plrhf.core.types import UserBatch
from plrhf.encoders import NoneEncoder, UniformEncoder
from plrhf.models.generation import generate
from plrhf.models.policy import PersonalDPOPolicy


@pytest.mark.sampled
@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in REFUSED_HERE])
def test_texts_begin_as_transformers_writes_them(name: str) -> None:
    """With no user model all aggregators must write what plain greedy search does."""
    backbone = lora_backbone(CAUSAL[name])
    prompts = [pair.prompt for pair in make_pairs(4, seed=1)]
    prompts += [tuple(reversed(prompts[0]))]  # two of one length, which are written together
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(3):
            logits = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        expected.append(ids[0, len(prompt) :].tolist())
    tokenizer = NoText()
    nobody = torch.zeros(len(prompts), dtype=torch.int64)
    users = UserBatch(user_id=nobody, features=torch.zeros(len(prompts), 0))
    for aggregator in aggregators(backbone):
        model = PersonalDPOPolicy(
            backbone=backbone, encoder=NoneEncoder(), aggregator=aggregator, n_users=2
        )
        found = generate(model, tokenizer, prompts, users, max_new_tokens=3, temperature=0)
        assert [json.loads(text) for text in found] == expected


@pytest.mark.sampled
@pytest.mark.parametrize(
    "name", ["llama", "gptj", "gpt2", "gemma3_w3", "llama4_chunks", "bloom", "rwkv"]
)
@pytest.mark.parametrize("position", ["before", "after_prompt"])
def test_texts_after_user_vectors_begin_as_transformers_writes_them(
    name: str, position: Any
) -> None:
    """Vectors that are embeddings of tokens must do what the tokens do, read again at every step."""
    backbone = lora_backbone(CAUSAL[name])
    own = (20, 70)
    prompts = [pair.prompt for pair in make_pairs(3, seed=1)]
    prompts += [prompts[0], prompts[1][::-1]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([(*own, *prompt) if position == "before" else (*prompt, *own)])
        for _ in range(3):
            logits = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        expected.append(ids[0, -3:].tolist())
    aggregator = ConcatSoftPrompt(
        hidden_size=backbone.hidden_size,
        embedding_size=backbone.embedding_size,
        n_tokens=2,
        position=position,
    )
    encoder = UniformEncoder(user_dim=aggregator.user_dim, vocabulary=backbone.vocabulary())
    with torch.no_grad():
        encoder.generic_vector.copy_(backbone.embed(torch.tensor(own)).flatten())
    model = PersonalDPOPolicy(backbone=backbone, encoder=encoder, aggregator=aggregator, n_users=2)
    nobody = torch.zeros(len(prompts), dtype=torch.int64)
    users = UserBatch(user_id=nobody, features=torch.zeros(len(prompts), 0))
    found = generate(model, NoText(), prompts, users, max_new_tokens=3, temperature=0)
    assert [json.loads(text) for text in found] == expected


class NoText:
    """A tokenizer that leaves tokens as they are."""

    pad_token_id = 3
    eos_token_id = None

    def batch_decode(self, tokens: Tensor, **_: Any) -> list[str]:
        return [json.dumps(row.tolist()) for row in tokens]


def aggregators(backbone: Backbone) -> list[Any]:
    size = backbone.hidden_size
    last = FiLM(hidden_size=size, n_blocks=2, user_dim=3)
    return [last, ConcatSoftPrompt(hidden_size=backbone.embedding_size, n_tokens=2)]
