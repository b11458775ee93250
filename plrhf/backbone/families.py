"""What a model of each family is, by its config."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)


def is_causal(config: Any) -> bool:
    """Whether a model of this config writes text left to right."""
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # BERT-like: as decoders too
        return bool(getattr(config, "is_decoder", False))
    own_code = getattr(config, "auto_map", None) or {}
    return (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in own_code
    )
