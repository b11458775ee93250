"""The row layout of each family of models, and why.

``packed`` puts a pair into one row, ``prompt | chosen | rejected``, with masks that let neither
response see the other. That is correct for models whose attention depends on masks and positions alone.
``two_rows`` gives each response a row of its own, as the model is normally used. Some models are
refused. These are expectations, which `plrhf.backbone.check` compares with the model itself.
"""

from __future__ import annotations

from typing import Any, Literal

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from plrhf.core.errors import bad_value

Layout = Literal["packed", "two_rows"]

PACKED = frozenset(
    {
        *("arcee", "bert", "biogpt", "camembert", "codegen", "cohere", "cohere2", "ctrl"),
        *(
            "deepseek_v3",
            "diffllama",
            "electra",
            "ernie4_5",
            "exaone4",
            "falcon",
            "gemma",
            "gemma2",
        ),
        *("gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj"),
        *("granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama", "llama4_text"),
        *("ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder", "nanochat"),
        *("nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3"),
        *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "roberta", "seed_oss", "smollm3", "stablelm"),
        *("starcoder2", "vaultgemma", "xglm", "xlm-roberta"),
    }
)
"""Families for which tests compare packed rows with plain ones; `check` may accept others."""

TWO_ROWS = {
    "bloom": "adds a bias by the distance of indices (ALiBi)",
    "mpt": "adds a bias by the distance of indices (ALiBi)",
    "gpt_neo": "keeps the windows of its local layers to itself",
    **dict.fromkeys(
        (
            *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear"),
            *("lfm2", "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid"),
            *("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "recurrent_gemma", "rwkv"),
            *("xlstm", "zamba", "zamba2"),
        ),
        "carries a state from one position to the next",
    ),
}
"""Causal families whose responses cannot share a row, with the reason."""

REFUSED = {
    "fnet": "mixes padding into the text",
    "reformer": "cuts its rows into chunks of a fixed length",
    "xlnet": "sees later tokens",
}
"""Families whose outputs depend on other rows, padding or later tokens, with the reason."""


def is_causal(config: Any) -> bool:
    """Return whether a model with this config is a left-to-right language model."""
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # BERT-like: as decoders too
        return bool(getattr(config, "is_decoder", False))
    own_code = getattr(config, "auto_map", None) or {}
    return (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in own_code
    )


def expected_layout(config: Any) -> tuple[Layout, str]:
    """Return the layout for a model of this config, and the reason for it.

    Raises:
        ValueError: the family is refused.
    """
    family = config.model_type
    refused = REFUSED.get(family)
    if getattr(config, "is_encoder_decoder", False):
        refused = "has an encoder and a decoder"
    if refused is not None:
        raise bad_value(
            "backbone.path",
            f"a model of the family {family}",
            f"a causal language model or a bidirectional encoder; this one {refused}",
            "Use a model of another family, as docs/families.md lists them",
        )
    if not is_causal(config):
        return "two_rows", "sees the whole row"
    if getattr(config, "alibi", False):
        return "two_rows", TWO_ROWS["bloom"]
    if family in TWO_ROWS:
        return "two_rows", TWO_ROWS[family]
    return "packed", "attends by masks and positions alone"


def families_page() -> str:
    """Return the text of docs/families.md: the layout of each family."""
    packed = ", ".join(f"`{name}`" for name in sorted(PACKED))
    two_rows = "\n".join(f"| `{name}` | {why} |" for name, why in sorted(TWO_ROWS.items()))
    refused = "\n".join(f"| `{name}` | {why} |" for name, why in sorted(REFUSED.items()))
    return PAGE.format(packed=packed, two_rows=two_rows, refused=refused)


PAGE = """# Families of language models

Made from `plrhf/backbone/families.py`. What stands here is expected, not trusted: when a model is
loaded, three short pairs go through its layout and, each sequence by itself, through the model's own
forward. Hidden states and logits must agree to 1e-4 of the largest number in float32. Where packed rows
differ, two rows are used and a line says so; where those differ too, the run ends with one line.

**Packed**, a pair in one row. Windows, chunks, soft caps and scales are the model's own: {packed}.
Bidirectional encoders always have two rows. Causal families that are not named anywhere are packed if
the check agrees. Weights that are sharded can't be checked: these families are packed then, all others
have two rows.

**Two rows** a pair, also for `falcon` with `alibi`:

| family | as it |
|---|---|
{two_rows}

**Refused**, beside all models with an encoder and a decoder:

| family | as it |
|---|---|
{refused}
"""
