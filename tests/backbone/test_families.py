"""Every family that is not refused, against transformers' own plain forward of each sequence alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import perturb
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from plrhf.aggregators import ConcatSoftPrompt
from plrhf.aggregators.film import modulated_blocks
from plrhf.backbone import families
from plrhf.backbone.families import is_causal
from plrhf.backbone.model import Backbone
from plrhf.core.errors import BadValue
from plrhf.core.logprobs import response_logps
from plrhf.core.types import PreferenceBatch
from plrhf.data.packing import LAYOUTS, TokenPair

SIZES = {"vocab_size": 400, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
LLAMA = {**SIZES, **IDS, "intermediate_size": 64, "num_key_value_heads": 2}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**LLAMA, "head_dim": 12, "query_pre_attn_scalar": 12}
MORE: dict[str, dict[str, Any]] = {
    "starcoder2_w5": {"model_type": "starcoder2", **LLAMA, "sliding_window": 5},
    "phi3_w6": {"model_type": "phi3", **LLAMA, "sliding_window": 6},
    "qwen2_w7": {
        "model_type": "qwen2",
        **{**LLAMA, **LAYERS},
        "use_sliding_window": True,
        "sliding_window": 7,
    },
    "qwen3_w4": {
        "model_type": "qwen3",
        **{**LLAMA, **LAYERS},
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 4,
    },
    "cohere2_w5": {"model_type": "cohere2", **LLAMA, **LAYERS, "sliding_window": 5},
    "gemma2_caps": {
        "model_type": "gemma2",
        **GEMMA,
        "sliding_window": 6,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 3.0,
    },
    "gemma3_w3": {"model_type": "gemma3_text", **GEMMA, **LAYERS, "sliding_window": 3},
    "olmo3_w6": {"model_type": "olmo3", **LLAMA, **LAYERS, "sliding_window": 6},
    "exaone4_w6": {"model_type": "exaone4", **LLAMA, **LAYERS, "sliding_window": 6},
    "ministral_w5": {
        "model_type": "ministral",
        **LLAMA,
        **LAYERS,
        "head_dim": 12,
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "llama4_chunks": {
        "model_type": "llama4_text",
        **LLAMA,
        "head_dim": 12,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": 6,
        "no_rope_layers": [1, 0],
    },
    "gpt_oss_w5": {
        "model_type": "gpt_oss",
        **LLAMA,
        **LAYERS,
        "head_dim": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
    },
    "llama_tied": {"model_type": "llama", **LLAMA, "tie_word_embeddings": True},
    "llama_bias": {"model_type": "llama", **LLAMA, "attention_bias": True, "mlp_bias": True},
    "opt_narrow": {
        "model_type": "opt",
        **SIZES,
        **IDS,
        "ffn_dim": 64,
        "word_embed_proj_dim": 20,
        "do_layer_norm_before": False,
    },
    "falcon_new": {
        "model_type": "falcon",
        **SIZES,
        **IDS,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "cohere_qk_norm": {
        "model_type": "cohere",
        **LLAMA,
        "use_qk_norm": True,
        "logit_scale": 0.25,
    },
    "glm4": {"model_type": "glm4", **LLAMA, "head_dim": 12},
    "granitemoe": {
        "model_type": "granitemoe",
        **LLAMA,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "logits_scaling": 4.0,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **LLAMA,
        "head_dim": 12,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
    },
    "gpt_neo_w3": {
        "model_type": "gpt_neo",
        **IDS,
        "vocab_size": 400,
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["local", "global"], 1]],
        "window_size": 3,
        "intermediate_size": 64,
    },
    "lfm2": {
        "model_type": "lfm2",
        **LLAMA,
        "layer_types": ["conv", "full_attention"],
    },
}
"""Configurations of our own beside those of families.json."""

FILE: dict[str, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("families.json").read_text()
)
CAUSAL = {**FILE["causal"], **MORE}
ENCODERS = FILE["encoders"]
REFUSED_HERE = {"bart", "xlnet", "t5", "fnet", "funnel"}


def wide_model(settings: dict[str, Any], *, attention: str | None = None) -> PreTrainedModel:
    """A model whose random weights are large enough for attention to matter."""
    settings = dict(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    if config.model_type == "funnel":
        config.architectures = ["FunnelModel"]
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if is_causal(config) else AutoModel
    model = kind.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def make_pairs(n: int, *, seed: int = 0) -> list[TokenPair]:
    """Pairs of unequal lengths, longer than the windows here."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(10, 400) for _ in range(draw.randint(least, most)))

    return [TokenPair(tokens(2, 16), tokens(1, 12), tokens(1, 12)) for _ in range(n)]


def batch_of(pairs: list[TokenPair], layout: Any) -> PreferenceBatch:
    input_ids, segment, position_ids = LAYOUTS[layout](pairs)
    blank = torch.zeros(len(pairs), dtype=torch.int64)
    return PreferenceBatch(
        user_id=blank,
        features=torch.zeros(len(pairs), 0),
        input_ids=input_ids,
        segment=segment,
        position_ids=position_ids,
        row=blank,
    )


def lora_backbone(settings: dict[str, Any], **options: Any) -> Backbone:
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear"}
    backbone = Backbone(model=wide_model(settings, **options), lora=lora)
    perturb(backbone, "lora_B", std=0.05)
    return backbone


def plain_logps(backbone: Backbone, prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    """Log-probability of one response, by the model's forward of this sequence alone."""
    ids = torch.tensor([[*prompt, *response]])
    logits = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    logps = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(prompt) - 1 :].sum()


def user_vectors(backbone: Backbone, tokens: list[tuple[int, ...]]) -> Tensor:
    """Embeddings of tokens, which as vectors must do what the tokens do."""
    return backbone.embed(torch.tensor(tokens))


def gradients(backbone: Backbone) -> dict[str, Tensor]:
    found = {
        name: torch.zeros_like(one) if one.grad is None else one.grad.clone()
        for name, one in backbone.named_parameters()
        if one.requires_grad
    }
    backbone.zero_grad()
    return found


def close(found: Tensor, expected: Tensor, what: str = "", allowed: float = 1e-3) -> None:
    scale = expected.abs().max().clamp(min=1e-6)
    error = float((found - expected).detach().abs().max() / scale)
    assert error <= allowed, f"{what} differ by {error:.1e}"


@pytest.mark.sampled
@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in REFUSED_HERE])
def test_log_probabilities_and_gradients_are_those_of_plain_sequences(name: str) -> None:
    backbone = lora_backbone(CAUSAL[name]).train()
    pairs = make_pairs(5)
    batch = batch_of(pairs, backbone.layout)
    n_rows = batch.segment.shape[0] // len(pairs)
    front = [(20 + place, 70 + place) for place in range(len(pairs))]
    vectors = user_vectors(backbone, front * n_rows).detach()
    hidden = backbone(batch.input_ids, batch.segment, batch.position_ids, user_vectors=vectors)
    ours = response_logps(
        hidden[:, 2:],
        batch.input_ids,
        batch.segment,
        backbone.unembed,
        n_pairs=len(pairs),
        constant=backbone.unembedding_is_constant,
    )
    weights = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    (ours * weights).sum().backward()
    our_gradients = gradients(backbone)
    plain = torch.stack(
        [
            torch.stack(
                [
                    plain_logps(backbone, (*tokens, *pair.prompt), response)
                    for response in (pair.chosen, pair.rejected)
                ]
            )
            for tokens, pair in zip(front, pairs, strict=True)
        ]
    )
    assert (ours - plain).abs().max() <= 2e-2 and torch.isfinite(plain).all()
    close(ours, plain, "log-probabilities")
    (plain * weights).sum().backward()
    plain_gradients = gradients(backbone)
    largest = max(float(one.abs().max()) for one in plain_gradients.values())
    assert largest > 0
    for key, expected in plain_gradients.items():
        error = float((our_gradients[key] - expected).abs().max()) / largest
        assert error <= 1e-3, f"gradients of {key} differ by {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gptj", "gpt2", "gemma3_w3", "mistral_sw", "bloom"])
def test_a_late_soft_prompt_is_that_of_plain_sequences(name: str) -> None:
    """`prompt | vectors | response` by inputs_embeds, one at a time: losses and gradients."""
    backbone = lora_backbone(CAUSAL[name]).train()
    with torch.no_grad():  # back to weights of a usual size, whose gradients 1e-5 can tell apart
        for parameter in backbone.model.get_base_model().parameters():
            parameter.mul_(0.25 if parameter.dim() >= 2 and not parameter.requires_grad else 1)
    pairs, n_tokens = make_pairs(4, seed=3), 3
    aggregator = ConcatSoftPrompt(
        hidden_size=48,
        embedding_size=backbone.embedding_size,
        n_tokens=n_tokens,
        position="after_prompt",
    )
    torch.manual_seed(1)
    user = (torch.randn(2 * len(pairs), aggregator.user_dim) / 4).requires_grad_()
    batch = batch_of(pairs, backbone.layout)
    hidden = aggregator(backbone, batch, user)
    found = torch.stack(
        [
            response_logps(
                of_context,
                batch.input_ids,
                batch.segment,
                backbone.unembed,
                n_pairs=len(pairs),
                constant=True,
            )
            for of_context in hidden
        ]
    )  # [C, B, 2]
    loss = -torch.nn.functional.logsigmoid(found[..., 0] - found[..., 1]).mean()
    loss.backward()
    ours = {"user": user.grad, **gradients(backbone)}
    user.grad = None

    def margin(vectors: Tensor, pair: TokenPair) -> Tensor:
        chosen, rejected = (
            plain_logps_after(backbone, pair.prompt, vectors, response)
            for response in (pair.chosen, pair.rejected)
        )
        return chosen - rejected

    margins = [
        margin(vectors.view(n_tokens, -1), pairs[place % len(pairs)])
        for place, vectors in enumerate(user)
    ]
    plain = -torch.nn.functional.logsigmoid(torch.stack(margins)).mean()
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=0)
    plain.backward()
    expected = {"user": user.grad, **gradients(backbone)}
    assert ours.keys() == expected.keys() and expected["user"].abs().max() > 1e-4
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("name", ["llama", "gptj", "gpt2", "gemma3_w3"])
def test_reading_on_from_prompts_that_were_read_is_reading_all(name: str) -> None:
    backbone = lora_backbone(CAUSAL[name])
    backbone.requires_grad_(False)
    aggregator = ConcatSoftPrompt(hidden_size=48, n_tokens=3, position="after_prompt")
    batch = batch_of(make_pairs(4, seed=3), "packed")
    torch.manual_seed(1)
    user = torch.randn(2 * len(batch), aggregator.user_dim)
    with torch.no_grad():
        kept = aggregator.without_user(backbone, batch)
    assert kept.prompts is not None and batch.prompts is None
    found = []
    for one in (batch, kept):
        given = user.clone().requires_grad_()
        hidden = aggregator(backbone, one, given)
        ends_prompt = (batch.segment == 0) & (batch.segment.roll(-1, dims=1) != 0)
        values = hidden[:, ends_prompt | (batch.segment > 0)]
        (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum().backward()
        found.append((values, given.grad))
    (plain, expected), (values, gradient) = found
    close(values, plain, "hidden states", allowed=1e-5)
    close(gradient, expected, "gradients", allowed=1e-4)


def plain_logps_after(
    backbone: Backbone, prompt: tuple[int, ...], vectors: Tensor, response: tuple[int, ...]
) -> Tensor:
    """Log-probability of a response that follows vectors [T, e] that follow a prompt."""
    text, answer = (backbone.embed(torch.tensor(ids)) for ids in (prompt, response))
    logits = backbone.model(inputs_embeds=torch.cat([text, vectors, answer])[None]).logits[0]
    logps = logits[len(text) + len(vectors) - 1 : -1].float().log_softmax(-1)
    return logps[range(len(response)), response].sum()


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in REFUSED_HERE])
def test_encoders_give_what_they_give_for_plain_sequences(name: str) -> None:
    backbone = lora_backbone(ENCODERS[name]).train()
    pairs = make_pairs(5)
    batch = batch_of(pairs, backbone.layout)
    vectors = user_vectors(backbone, [(20, 70)] * (2 * len(pairs)))
    with torch.no_grad():
        hidden = backbone(batch.input_ids, batch.segment, batch.position_ids, user_vectors=vectors)
        assert hidden.shape[-1] == backbone.hidden_size
        rows = [(p.prompt, r) for r in ("chosen", "rejected") for p in pairs]
        for row, (prompt, which) in enumerate(rows):
            response = getattr(pairs[row % len(pairs)], which)
            ids = torch.tensor([[20, 70, *prompt, *response]])
            plain = backbone.model(input_ids=ids).last_hidden_state[0]
            close(hidden[row, : ids.shape[1]], plain, "hidden states")


@pytest.mark.parametrize("name", sorted(REFUSED_HERE))
def test_a_model_that_is_right_in_no_layout_is_refused_in_one_line(name: str) -> None:
    settings = {**CAUSAL, **ENCODERS}[name]
    with pytest.raises(BadValue, match="docs/families.md") as caught:
        Backbone(model=wide_model(settings), trainable="frozen")
    assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gemma3_w3", "mistral_sw", "qwen2_w7", "llama4_chunks"])
def test_windows_count_positions_in_each_implementation(name: str, attention: str) -> None:
    backbone = Backbone(model=wide_model(CAUSAL[name], attention=attention), trainable="frozen")
    assert backbone.layout == "packed"
    pairs = make_pairs(5, seed=2)
    batch = batch_of(pairs, "packed")
    hidden = backbone(batch.input_ids, batch.segment, batch.position_ids)
    found = response_logps(
        hidden, batch.input_ids, batch.segment, backbone.unembed, n_pairs=len(pairs), constant=True
    )
    expected = [
        [plain_logps(backbone, pair.prompt, one) for one in (pair.chosen, pair.rejected)]
        for pair in pairs
    ]
    close(found, torch.tensor(expected))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt_neo_w3", "bloom", "mamba2", "jamba"])
def test_what_cannot_be_packed_has_two_rows_also_where_no_table_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "TWO_ROWS", {})
    assert Backbone(model=wide_model(CAUSAL[name]), trainable="frozen").layout == "two_rows"


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "opt", "bert_dec"])
def test_policy_and_reference_agree_before_the_first_step(name: str) -> None:
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear"}
    backbone = Backbone(model=wide_model(CAUSAL[name]), lora=lora).train()
    batch = batch_of(make_pairs(3), backbone.layout)
    inputs = (batch.input_ids, batch.segment, batch.position_ids)
    policy = backbone(*inputs)
    with backbone.reference():
        close(policy, backbone(*inputs), allowed=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma2_caps", "granite", "opt", "gpt_neo_w8", "llama4_chunks"])
def test_film_at_every_block_is_that_of_plain_sequences(name: str) -> None:
    backbone = lora_backbone(CAUSAL[name])
    pairs = make_pairs(4)
    batch = batch_of(pairs, backbone.layout)
    torch.manual_seed(3)
    film = torch.randn(batch.segment.shape[0], 2, 2, backbone.block_size) / 4
    with modulated_blocks(backbone, film):
        hidden = backbone(batch.input_ids, batch.segment, batch.position_ids)
    found = response_logps(
        hidden, batch.input_ids, batch.segment, backbone.unembed, n_pairs=len(pairs), constant=True
    )
    for place, pair in enumerate(pairs):
        for which, response in enumerate((pair.chosen, pair.rejected)):
            row = place if backbone.layout == "packed" else which * len(pairs) + place
            with modulated_blocks(backbone, film[row : row + 1]):
                close(found[place, which], plain_logps(backbone, pair.prompt, response))


def test_the_page_of_families_is_what_the_tables_say() -> None:
    page = Path(__file__).parents[2] / "docs/families.md"
    assert page.read_text() == families.families_page()
