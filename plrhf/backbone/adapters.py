"""LoRA adapters on the linear layers of a language model."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from plrhf.backbone.families import is_causal
from plrhf.backbone.quantization import is_quantized
from plrhf.backbone.sharding import is_sharded
from plrhf.core.errors import bad_value

ALL_LINEAR = "all-linear"

MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Families on whose output projection PEFT does not allow LoRA, since their kernels use its weight
directly."""


def layers_without_lora(model: PreTrainedModel) -> list[str] | None:
    """Return the names of the linear layers that "all-linear" must leave out; None if there are none.

    These are layers that return more than one tensor (some routers), and layers that PEFT does not
    allow.
    """
    barred = {"out_proj", "conv1d"} if model.config.model_type in MAMBA else set()
    names = [
        name
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear)
        and (name.split(".")[-1] in barred or not returns_one_tensor(one))
    ]
    return names if len(names) > 0 else None


def returns_one_tensor(layer: nn.Linear) -> bool:
    """Return whether a linear layer returns one tensor of its width, as some subclasses do not."""
    if type(layer).forward is nn.Linear.forward or is_sharded(layer.weight) or is_quantized(layer):
        return True
    with torch.no_grad():
        found = layer(layer.weight.new_zeros(1, layer.in_features))
    return isinstance(found, torch.Tensor) and found.shape == (1, layer.out_features)


def add_lora(
    model: PreTrainedModel, *, r: int, alpha: int, dropout: float, target_modules: Any
) -> PeftModel:
    """Freeze `model` and add LoRA adapters to linear layers.

    Args:
        r: rank. alpha: scale of the adapters, which is divided by r. dropout: rate on their inputs.
        target_modules: a list of layer names, or "all-linear".

    Raises:
        ValueError: a number out of range, or names of layers that the model does not have.
    """
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
        exclude_modules=layers_without_lora(model) if targets == ALL_LINEAR else None,
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
            f"names among {linear}"
            if targets == ALL_LINEAR
            else f"all-linear or names among {linear}",
            "Name layers this model has",
        ) from error
