"""Numbers of texts by writer, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pair_data import make_data
from tiny import LORA
from transformers import BloomConfig, BloomForCausalLM

from plrhf.aggregators import FiLM
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj
from plrhf.encoders import NoneEncoder
from plrhf.evaluation.generations import GeneratedText, reference_logps
from plrhf.evaluation.text_quality import distinct_share, text_quality
from plrhf.models.policy import PersonalDPOPolicy


def text(user: str, writer: str, response: str, **known: Any) -> GeneratedText:
    fields: dict[str, Any] = {"prompt": "Why?", "prompt_id": "why", "profile": None, "score": None}
    fields |= {"user_id": user, "writer": writer, "response": response, "user_features": None}
    return GeneratedText(**{**fields, **known})


def test_distinct_n_grams() -> None:
    texts = ["the cat and the dog", "The cat sat"]  # 8 words, 5 distinct; 6 pairs, 5 distinct
    assert distinct_share(texts, 1) == pytest.approx(5 / 8)
    assert distinct_share(texts, 2) == pytest.approx(5 / 6)
    assert distinct_share(["one"], 2) == 0


def test_writers_are_compared_user_by_user() -> None:
    """Two users with the same text: neither repeats anything, though together they do."""
    texts = [
        text("ann", "policy", "so it is", score=1.0, reference_logp=-2.0),
        text("bob", "policy", "so it is", score=2.0, reference_logp=-4.0),
        text("ann", "reference", "no no no no", score=-1.0),
        text("bob", "reference", "no no no no"),
    ]
    policy, reference = text_quality(texts)
    assert (policy.writer, policy.n_texts, policy.words) == ("policy", 2, 3)
    assert (policy.score, policy.reference_logp, policy.distinct) == (1.5, -3.0, (1.0, 1.0))
    assert (reference.score, reference.reference_logp) == (None, None)
    assert reference.distinct == (1 / 4, 1 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gptj", "bloom"])
def test_texts_are_scored_under_the_reference_one_by_one(tokenizer: Any, family: str) -> None:
    """Bloom reads one text a row; responses to one prompt must not be seen by one another."""
    data = make_data(tokenizer, causal=family != "bloom", eval_batch_size=64)
    if family == "bloom":
        shape = {"hidden_size": 16, "n_layer": 2, "n_head": 2}
        language_model: Any = BloomForCausalLM(BloomConfig(vocab_size=300, **shape))
    else:
        language_model = tiny_gptj(
            vocab_size=300, n_layers=2, width=16, n_heads=2, max_positions=64, eos_token_id=0
        )
    backbone = Backbone(model=language_model, trainable="lora", lora=LORA)
    model = PersonalDPOPolicy(
        backbone=backbone,
        encoder=NoneEncoder(),
        aggregator=FiLM(hidden_size=16, n_blocks=2, site="last"),
        n_users=5,
    ).eval()
    rows = data.splits.train
    texts = [row.chosen for row in rows]
    found = reference_logps(model, data, rows, texts)
    for row, value in zip(rows, found, strict=True):
        pair = data.row_tokenizer.pair(row)
        ids = torch.tensor([[*pair.prompt, *pair.chosen]])
        with torch.no_grad(), backbone.reference():
            logits = language_model(ids).logits.log_softmax(dim=-1)[0, :-1]
        each = logits.gather(1, ids[0, 1:, None])[len(pair.prompt) - 1 :]
        assert value == pytest.approx(float(each.mean()), abs=1e-5)
