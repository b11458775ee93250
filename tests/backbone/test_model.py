"""The language model underneath: masks, positions, adapters, loading, what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    LORA,
    N_LAYERS,
    VOCABULARY,
    WIDTH,
    language_model,
    make_backbone,
    make_batch,
    make_pairs,
)
from torch import nn, tensor
from transformers import (
    AutoModel,
    BertConfig,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from plrhf.backbone.families import is_causal
from plrhf.backbone.loading import (
    check_vocabulary,
    load_backbone,
    load_model,
    load_tokenizer,
    looks_local,
)
from plrhf.backbone.masks import PackedRows, visibility
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj, train_tokenizer
from plrhf.core.errors import BadValue


def test_mask_by_hand() -> None:
    segment = tensor([[0, 0, 1, 1, 2, -1, -1]])
    seen = visibility(PackedRows(segment, segment))
    assert seen.shape == (1, 7, 7)
    assert seen[0].long().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],  # prompt: itself and what stands before
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],  # chosen: prompt and chosen
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],  # rejected: prompt and rejected, never chosen
        [1, 1, 0, 0, 0, 1, 0],  # padding, whose states nobody reads: itself at least
        [1, 1, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("kind", ["gptj", "llama"])
@torch.no_grad()
def test_a_response_sees_its_own_text_only(kind: str) -> None:
    backbone = make_backbone(kind)
    batch = make_batch(make_pairs(5))
    before = backbone(batch.input_ids, batch.segment, batch.position_ids)
    changed = torch.where(batch.segment == 1, 7, batch.input_ids)
    after = backbone(changed, batch.segment, batch.position_ids)
    moved = (before - after).abs().amax(-1) > 1e-6
    assert not moved[batch.segment != 1].any()
    assert moved[batch.segment == 1].any()


@torch.no_grad()
def test_a_bidirectional_encoder_sees_everything_but_padding() -> None:
    backbone = make_backbone("bert", trainable="frozen")
    pairs = make_pairs(1)
    short, padded = make_batch(pairs), make_batch(pairs, padding=3)
    text = padded.input_ids.clone()
    found = backbone(text, padded.segment, padded.position_ids)
    alone = backbone(short.input_ids, short.segment, short.position_ids)
    length = short.input_ids.shape[1]
    torch.testing.assert_close(found[:, :length], alone, atol=1e-5, rtol=0)
    text[:, length - 1] = text[:, length - 1] % 96 + 1  # the last token of the text
    assert (backbone(text, padded.segment, padded.position_ids) - found)[0, 0].abs().max() > 1e-3


OWN_CODE: Any = PreTrainedConfig()  # of a model that brings its code along
OWN_CODE.auto_map = {"AutoModelForCausalLM": "own.Model"}


@pytest.mark.parametrize(
    ("config", "causal"),
    [
        (GPTJConfig(), True),
        (LlamaConfig(), True),
        (GPTNeoXConfig(), True),  # though its `is_decoder` says no
        (BertConfig(), False),
        (BertConfig(is_decoder=True), True),
        (RobertaConfig(), False),
        (MPNetConfig(), False),  # known to transformers as no causal model at all
        (ModernBertConfig(), False),
        (OWN_CODE, True),
        (PreTrainedConfig(), False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_which_models_are_causal(config: Any, causal: bool) -> None:
    assert is_causal(config) == causal


def test_what_a_backbone_says_of_itself() -> None:
    for kind in ("gptj", "llama", "bert"):
        backbone = make_backbone(kind)
        assert backbone.hidden_size == WIDTH
        assert len(backbone.blocks) == N_LAYERS
        assert backbone.causal == (kind != "bert")
        assert backbone.max_positions == 128
        assert backbone.vocabulary().shape == (VOCABULARY, WIDTH)
        assert not backbone.vocabulary().requires_grad


@pytest.mark.parametrize(("config_class", "usable"), [(BertConfig, 18), (RobertaConfig, 16)])
@torch.no_grad()
def test_all_positions_it_names_are_there(config_class: Any, usable: int) -> None:
    config = config_class(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=18,
    )
    backbone = Backbone(model=AutoModel.from_config(config), trainable="frozen")
    assert backbone.max_positions == usable
    segment = torch.zeros(1, usable, dtype=torch.int64)
    assert backbone(segment + 7, segment, segment).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        more = nn.functional.pad(segment, (0, 1))
        backbone(more + 7, more, more)


@pytest.mark.parametrize("trainable", ["lora", "frozen", "full"])
def test_what_is_trained(trainable: Any) -> None:
    backbone = make_backbone(trainable=trainable)
    learns = {name: value.requires_grad for name, value in backbone.named_parameters()}
    if trainable == "lora":
        assert {name for name, yes in learns.items() if yes} == {n for n in learns if "lora_" in n}
        assert sum(learns.values()) == N_LAYERS * 6 * 2  # q k v out fc_in fc_out, A and B
    else:
        assert set(learns.values()) == {trainable == "full"}


def test_the_state_dict_holds_every_weight_once() -> None:
    backbone = make_backbone()
    names = {name for name, _ in backbone.named_parameters()}
    buffers = {name for name, _ in backbone.named_buffers()}
    assert names == set(backbone.state_dict()) - buffers


def test_named_layers_get_lora() -> None:
    lora = {**LORA, "target_modules": ["q_proj", "fc_in"]}
    names = [name for name, _ in make_backbone(lora=lora).named_parameters() if "lora_A" in name]
    assert len(names) == N_LAYERS * 2
    assert all("q_proj" in name or "fc_in" in name for name in names)


@pytest.mark.slow
def test_fingerprint_tells_frozen_weights_apart() -> None:
    one, same, other = make_backbone(), make_backbone(), make_backbone()
    with torch.no_grad():
        for name, value in same.named_parameters():
            if "lora" in name:  # learned: not part of it
                value.add_(1.0)
        other.vocabulary()[5, 5] += 0.1  # shares memory with the weight
    assert one.fingerprint() == same.fingerprint()
    assert one.fingerprint() != other.fingerprint()
    assert len(one.fingerprint()) == 16
    # What was computed before is not used once a weight was written.
    with torch.no_grad():
        one.vocabulary()[5, 5] += 0.1
    assert one.fingerprint() == other.fingerprint()
    with torch.inference_mode():  # whose tensors have no version
        assert make_backbone().fingerprint() == same.fingerprint()


def test_fingerprint_does_not_depend_on_the_order_of_summation() -> None:
    backbone = Backbone(model=language_model(), trainable="frozen")
    first = backbone.fingerprint()
    with torch.no_grad():
        for value in backbone.parameters():
            value.copy_(value.flatten().flip(0).view_as(value))
    assert backbone.fingerprint() == first


@torch.no_grad()
def test_adapter_saved_and_loaded(tmp_path: Path) -> None:
    batch = make_batch(make_pairs(3))

    def hidden(backbone: Backbone) -> Any:
        return backbone(batch.input_ids, batch.segment, batch.position_ids)

    saved, fresh = make_backbone(), Backbone(model=language_model(), lora=LORA)
    saved.save(tmp_path)
    assert not hidden(fresh).allclose(hidden(saved))
    fresh.load_adapter(tmp_path)
    torch.testing.assert_close(hidden(fresh), hidden(saved))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("change", ["missing", "other", "shape", "nan"])
def test_an_adapter_with_other_tensors_is_refused(change: str, tmp_path: Path) -> None:
    backbone = make_backbone()
    backbone.save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    name = sorted(state)[-1]
    value = state.pop(name)
    if change == "other":
        state |= {name: value, "lora_of_somebody": value.clone()}
    elif change == "shape":
        state[name] = value[:-1].clone()
    elif change == "nan":
        state[name] = torch.full_like(value, torch.nan)
    save_file(state, path)
    shape, shorter = tuple(value.shape), (value.shape[0] - 1, *value.shape[1:])
    said = {
        "missing": f"{name}=None is not allowed: expected shape {shape}",
        "other": f"lora_of_somebody={shape} is not allowed: expected no such tensor",
        "shape": f"{name}={shorter} is not allowed: expected shape {shape}",
        "nan": f"{name}='nan or inf' is not allowed: expected finite real numbers",
    }
    with pytest.raises(BadValue) as error:
        backbone.load_adapter(tmp_path)
    line = f"adapter_model.safetensors {said[change]}. Export the model anew."
    assert str(error.value) == line


@torch.no_grad()
def test_merged_is_the_plain_model_that_says_the_same() -> None:
    batch = make_batch(make_pairs(3))
    backbone = make_backbone()
    before = backbone(batch.input_ids, batch.segment, batch.position_ids)
    merged = Backbone(model=backbone.merged(), trainable="frozen")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    after = merged(batch.input_ids, batch.segment, batch.position_ids)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


@torch.no_grad()
def test_full_model_saved_and_loaded(tmp_path: Path) -> None:
    """Also where an earlier save left its weights, in one file or in several."""
    backbone = make_backbone(trainable="full")
    (tmp_path / "backbone").mkdir()
    for name in ("model.safetensors", "model-00001.safetensors", "model.safetensors.index.json"):
        (tmp_path / "backbone" / name).write_text("of an earlier save")
    backbone.save(tmp_path)
    assert [one.name for one in (tmp_path / "backbone").glob("model*")] == ["model.safetensors"]
    again = load_backbone(path=str(tmp_path / "backbone"), trainable="full", dtype="float32")
    assert again.vocabulary().equal(backbone.vocabulary())


def test_models_load_as_what_they_are(tmp_path: Path) -> None:
    for kind in ("gptj", "bert"):
        language_model(kind).save_pretrained(tmp_path / kind)
        backbone = load_backbone(
            path=str(tmp_path / kind), trainable="frozen", dtype="bfloat16", attention="eager"
        )
        assert backbone.causal == (kind == "gptj")
        assert backbone.vocabulary().dtype == torch.bfloat16
        assert backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["gptj", "llama"])
def test_half_precision_stays_near(kind: str) -> None:
    batch = make_batch(make_pairs(5))
    backbone = make_backbone(kind)
    inputs = batch.input_ids, batch.segment, batch.position_ids
    exact = backbone(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        near = backbone(*inputs)
    assert near.isfinite().all()
    assert (near - exact)[batch.segment >= 0].abs().max() < 0.2


def test_learned_tokenizer_reads_back_any_text() -> None:
    tokenizer = train_tokenizer(["The sea."], vocab_size=300)
    text = "Größe 水 \n\t<x>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id == 0


def save(tokenizer: Any, directory: Path, **changes: Any) -> str:
    tokenizer = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_tokenizer_without_a_pad_token(tokenizer: Any, tmp_path: Path) -> None:
    path = save(tokenizer, tmp_path, pad_token=None)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(path)
    assert str(caught.value) == (
        f"backbone.pad_token=None is not allowed: expected a token of the vocabulary, as {path} "
        "has no pad token of its own. Set backbone.pad_token='<|endoftext|>'."
    )
    assert load_tokenizer(path, pad_token="<|endoftext|>").pad_token_id == 0
    with pytest.raises(ValueError) as caught:
        load_tokenizer(path, pad_token="<pad>")
    assert str(caught.value) == (
        "backbone.pad_token='<pad>' is not allowed: expected a token of the vocabulary. "
        "Set backbone.pad_token='<|endoftext|>'."
    )


def test_tokenizer_without_an_end_token(tokenizer: Any, tmp_path: Path) -> None:
    path = save(tokenizer, tmp_path, eos_token=None)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(path)
    assert str(caught.value) == (
        f"backbone.path={path!r} is not allowed: expected a tokenizer with an end-of-sequence or "
        "separator token. Set eos_token in its tokenizer_config.json."
    )


def test_no_tokenizer_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_tokenizer(str(tmp_path))
    message = str(caught.value)
    assert f"backbone.path='{tmp_path}' is not allowed: expected a directory or hub name" in message
    assert "\n" not in message


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_model(str(tmp_path))
    assert str(caught.value) == (
        f"backbone.path='{tmp_path}' is not allowed: expected a model's directory (with "
        "config.json) or a hub name. Give the directory that save_pretrained wrote."
    )


@pytest.mark.parametrize("content", ["{}", "{", '{"model_type": "gptj"}'])
def test_a_damaged_model(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        load_model(str(tmp_path))
    message = str(caught.value)
    start = "is not allowed: expected a model's directory or a hub name that can be reached."
    assert message.startswith(f"backbone.path='{tmp_path}' {start} Check it (")
    assert "\n" not in message


def test_what_looks_local(tmp_path: Path) -> None:
    assert all(looks_local(path) for path in ("./x", "/x", "~/x", "../x", str(tmp_path)))
    assert not looks_local("EleutherAI/gpt-j-6b")


def test_model_without_a_list_of_blocks() -> None:
    backbone = make_backbone()
    backbone.config.num_hidden_layers = 17
    with pytest.raises(ValueError) as caught:
        _ = backbone.blocks
    assert str(caught.value) == (
        "backbone.path='GPTJModel' is not allowed: expected a model with one list of blocks. "
        "Use aggregator=soft_prompt or aggregator.site=last with it."
    )


@pytest.mark.parametrize("kind", ["gptj", "llama"])
def test_attention_that_a_model_does_not_have(kind: str, tmp_path: Path) -> None:
    language_model(kind).save_pretrained(tmp_path)
    has = {
        "gptj": "GPTJForCausalLM has: eager",
        "llama": "LlamaForCausalLM has: eager, sdpa, flex_attention",
    }
    with pytest.raises(ValueError) as caught:
        load_model(str(tmp_path), attention="flash_attention_2")
    assert str(caught.value) == (
        "backbone.attention='flash_attention_2' is not allowed: expected null or one that "
        f"{has[kind]}. Set backbone.attention=null."
    )
    assert load_model(str(tmp_path), attention="eager").config._attn_implementation == "eager"


BAD = [
    (
        lambda: make_backbone(compiled=True),
        "backbone.compiled=True is not allowed: expected false for GPT-J, whose own forward leaves it "
        "little to gain. Set backbone.compiled=false.",
    ),
    (
        lambda: make_backbone(trainable="all"),
        "backbone.trainable='all' is not allowed: expected lora, frozen or full. "
        "Set backbone.trainable=lora.",
    ),
    (
        lambda: make_backbone(lora=None),
        "backbone.lora=None is not allowed: expected r, alpha, dropout and target_modules. "
        "Give them, or set backbone.trainable=frozen.",
    ),
    (
        lambda: make_backbone(lora={**LORA, "r": 0}),
        "backbone.lora.r=0 is not allowed: expected a whole number from 1. Set backbone.lora.r=8.",
    ),
    (
        lambda: make_backbone(lora={**LORA, "dropout": 1.0}),
        "backbone.lora.dropout=1.0 is not allowed: expected a number from 0 to below 1. "
        "Set backbone.lora.dropout=0.05.",
    ),
    (
        lambda: make_backbone(lora={**LORA, "target_modules": ["query"]}),
        "backbone.lora.target_modules=['query'] is not allowed: expected all-linear or names among "
        "['fc_in', 'fc_out', 'k_proj', 'lm_head', 'out_proj', 'q_proj', 'v_proj']. "
        "Name layers this model has.",
    ),
    (
        lambda: load_model("x/y", dtype="int8"),
        "backbone.dtype='int8' is not allowed: expected one of ['bfloat16', 'float16', 'float32']. "
        "Set backbone.dtype=float32.",
    ),
    (
        lambda: tiny_gptj(
            vocab_size=9, n_layers=1, width=30, n_heads=4, max_positions=8, eos_token_id=0
        ),
        "backbone.width=30 is not allowed: expected a multiple of backbone.n_heads=4. "
        "Set backbone.width=28.",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_settings(build: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build()
    assert str(caught.value) == message


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused() -> None:
    tokenizer = train_tokenizer(["some words to learn from"], vocab_size=300)
    largest = max(tokenizer.get_vocab().values())
    fits = Backbone(model=language_model(vocabulary=largest + 1), trainable="frozen")
    check_vocabulary(fits, tokenizer)
    small = Backbone(model=language_model(vocabulary=largest), trainable="frozen")
    with pytest.raises(BadValue, match=f"token ids up to {largest}.*ids below {largest}"):
        check_vocabulary(small, tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(BadValue, match="backbone.pad_token='<pad>'"):
        check_vocabulary(fits, tokenizer)


def test_quantised_weights_without_their_library_are_refused_in_one_line(tmp_path: Path) -> None:
    language_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadValue, match="backbone.path") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
