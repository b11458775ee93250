"""A policy and one user as a plain model: transformers alone computes what the policy does for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import composed
from test_families import CAUSAL, lora_backbone
from tiny import make_backbone
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import plrhf
from plrhf.aggregators import ConcatSoftPrompt, FiLM
from plrhf.backbone.merging import add_prompt_tokens, fold_into_norm, put_in_front
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import train_tokenizer
from plrhf.cli.export import export

TEXT = torch.tensor([[11, 7, 30, 5, 21]])
SHIFTED = ("gptj", "gpt2", "opt", "bloom", "gpt_neox", "falcon", "starcoder2", "phi")
SCALED = ("llama", "qwen2", "gemma", "gemma2", "gemma3_w3", "cohere", "olmo2", "gpt_oss")
NAMES = [name for name in (*SHIFTED, *SCALED) if name in CAUSAL]


def logits_of(backbone: Backbone, hidden: Tensor) -> Tensor:
    return backbone.unembed(hidden).float()


@pytest.mark.sampled
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_scale_and_shift_become_part_of_the_last_norm(name: str) -> None:
    backbone = lora_backbone(CAUSAL[name]).eval()
    generator = torch.Generator().manual_seed(3)
    size = backbone.hidden_size
    scale = 1 + 0.5 * torch.randn(size, generator=generator)
    shift = 0.3 * torch.randn(size, generator=generator) * (name in SHIFTED)
    mask = torch.ones_like(TEXT)
    hidden = backbone.call_trunk(TEXT, None, attention_mask=mask).float()
    expected = logits_of(backbone, hidden * scale + shift)
    assert not torch.allclose(expected, logits_of(backbone, hidden), atol=1e-2)
    probe = torch.tensor([[2, 3, 4, 5, 6, 7, 8]])
    before = backbone.call_trunk(probe, None, attention_mask=torch.ones_like(probe)).float()
    plain = backbone.merged()
    fold_into_norm(backbone, scale, shift, before)
    found = plain(input_ids=TEXT, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.sampled
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_soft_prompt_becomes_tokens(name: str) -> None:
    """The twin is the aggregator itself, as it reads the text behind the user's vectors."""
    backbone = lora_backbone(CAUSAL[name]).eval()
    aggregator = ConcatSoftPrompt(hidden_size=backbone.hidden_size, n_tokens=2)
    if backbone.embedding_size != backbone.hidden_size:
        pytest.skip("one width for both here")
    vectors = 0.7 * torch.randn(2, backbone.embedding_size)
    mask = torch.ones_like(TEXT)
    with aggregator.decoding(backbone, TEXT, mask, vectors.view(1, -1)) as inputs:
        own = inputs["input_ids"]
        hidden = backbone.call_trunk(own, None, attention_mask=torch.ones_like(own))
    expected = logits_of(backbone, hidden)[:, 2:]
    n_tokens = backbone.vocabulary_size
    tokenizer: Any = words(n_tokens - 1)
    plain = backbone.merged()
    put_in_front(tokenizer, add_prompt_tokens(backbone, plain, tokenizer, vectors))
    assert backbone.vocabulary_size > n_tokens  # one of the two has a row already
    ids = tokenizer("w11 w7 w30 w5 w21")["input_ids"]
    assert ids == [n_tokens - 1, n_tokens, *TEXT[0].tolist()]
    found = plain(input_ids=torch.tensor([ids])).logits[:, 2:, : n_tokens - 1]
    torch.testing.assert_close(found, expected[..., : n_tokens - 1], atol=1e-4, rtol=1e-4)
    assert plain.generation_config.suppress_tokens == [n_tokens - 1, n_tokens]


def words(n_tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose token n is the word wn."""
    tokenizer = train_tokenizer(["a"], vocab_size=260)
    vocabulary = {f"w{n}": n for n in range(n_tokens)}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w1"}
    backend |= {"added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}}
    backend |= {"post_processor": None, "decoder": None, "normalizer": None}
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))


def test_a_norm_without_bias_cannot_hold_a_shift() -> None:
    backbone = make_backbone("llama")
    with pytest.raises(ValueError, match=r"^aggregator.shift=True .*LlamaForCausalLM has no bias"):
        fold_into_norm(backbone, torch.ones(32), torch.ones(32), torch.zeros(1, 7, 32))


def test_film_without_a_shift() -> None:
    film = FiLM(hidden_size=6, n_blocks=2, user_dim=3, shift=False)
    assert film.film(torch.ones(3)).shape == (1, 1, 6)
    with pytest.raises(ValueError, match=r"^aggregator.shift=False .* true with site=every_block"):
        FiLM(hidden_size=6, n_blocks=2, site="every_block", shift=False)


@pytest.mark.slow
@pytest.mark.parametrize("user", ["user-0", None])
def test_the_command(policy_run: Path, tmp_path: Path, user: str | None) -> None:
    card = json.loads((policy_run / "export/plrhf.json").read_text())
    who = None if user is None else card["users"][1]
    out = tmp_path / "merged"
    overrides = [f"run={policy_run}", f"out={out}", f"user={who or 'null'}"]
    export(composed(*overrides, config="export"))
    with pytest.raises(ValueError, match=r"^out=.* a folder that is empty or not there"):
        export(composed(*overrides, config="export"))
    prompts = ["Write a note about the harbour.", "Ask for tea."]
    asked = [{"prompt": prompt, **({} if who is None else {"user_id": who})} for prompt in prompts]
    expected = plrhf.load(policy_run).write(asked, max_new_tokens=12, temperature=0.0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt + "\n", return_tensors="pt")  # data.separator
        written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = written[0, inputs["input_ids"].shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True))
    assert found == expected


@pytest.mark.slow
def test_a_reward_model_is_refused(reward_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^run=.* a policy"):
        export(composed(f"run={reward_run}", f"out={tmp_path / 'm'}", config="export"))
