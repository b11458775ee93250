"""LoRA put beside the linear layers of a language model."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from plrhf.backbone.families import is_causal
from plrhf.core.errors import bad_value


def add_lora(
    model: PreTrainedModel, *, r: int, alpha: int, dropout: float, target_modules: Any
) -> PeftModel:
    """Freeze `model` and put LoRA beside the named linear layers (a list, or "all-linear")."""
    if r < 1:
        raise bad_value("backbone.lora.r", r, "a whole number from 1", "Set backbone.lora.r=8")
    if not 0 <= dropout < 1:
        raise bad_value(
            "backbone.lora.dropout",
            dropout,
            "a number from 0 to below 1",
            "Set backbone.lora.dropout=0.05",
        )
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM" if is_causal(model.config) else "FEATURE_EXTRACTION",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        linear = sorted(
            {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        )
        raise bad_value(
            "backbone.lora.target_modules",
            targets,
            f"all-linear or names among {linear}",
            "Name layers this model has",
        ) from error
