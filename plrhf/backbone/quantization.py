"""Frozen weights in four or eight bits by bitsandbytes; LoRA adapters keep their precision.

``nf4`` is QLoRA's data type (Dettmers et al. 2023, arXiv 2305.14314): each block of 64 weights has a
scale, and the scales are quantised as well. ``int8`` is LLM.int8 (Dettmers et al. 2022, arXiv
2208.07339).
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import is_bitsandbytes_available

from plrhf.core.errors import bad_value

Quantization = Literal["nf4", "int8"]

BITS = {"nf4": 4, "int8": 8}


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return transformers' settings for a quantisation; `dtype` is the dtype of its products.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise bad_value(
            "backbone.quantization",
            quantization,
            "null where bitsandbytes is not installed",
            "Run pip install -c constraints.txt -e '.[quant]', or set backbone.quantization=null",
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_quantized(module: nn.Module) -> bool:
    """Return whether a layer is quantised by bitsandbytes, or is a `QuantizedShape`."""
    return type(module).__module__.startswith("bitsandbytes") or isinstance(module, QuantizedShape)


def rounds_activations(model: nn.Module) -> bool:
    """Return whether a model's layers quantise their inputs too, as LLM.int8 does."""
    return bool(getattr(model, "is_loaded_in_8bit", False))


def keep_stored_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Stop bitsandbytes from repacking quantised weights, and silence its warnings; return the model.

    On some CPUs it repacks weights in bfloat16 when they are used without gradients, after which they
    give no gradients. It also warns at every product of float32 inputs.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


class QuantizedShape(nn.Linear):
    """Has the memory and the operations of a quantised layer, but no values; for plans of a run.

    Args:
        layer: the transformers layer that it replaces. bits: of a weight.
    """

    def __init__(self, layer: nn.Linear | Conv1D, bits: int) -> None:
        nn.Module.__init__(self)
        shape: Any = (
            layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
        )
        self.out_features, self.in_features = shape
        self.dtype = layer.weight.dtype
        stored = torch.empty(shape.numel() * bits // 8, dtype=torch.uint8)
        self.weight = nn.Parameter(stored, requires_grad=False)
        # A number for each output, or a byte for each 64 weights.
        n_bytes = 4 * shape[0] if bits == 8 else -(-shape.numel() // 64)
        scales = torch.empty(n_bytes, dtype=torch.uint8)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = layer.bias

    @property
    def n_uncounted(self) -> int:
        """Number of weights minus that of stored numbers, each of which may hold several weights."""
        n_stored = self.weight.numel() + self.scales.numel()
        return self.in_features * self.out_features - n_stored

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.weight, self.out_features, self.in_features, self.dtype)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """Computes x W^T. W is made from its bits in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, n_out: int, n_in: int, dtype: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = (n_out, n_in)
        return x @ weight.new_empty(n_out, n_in, dtype=dtype).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        whole = weight.new_empty(ctx.shape, dtype=grads[0].dtype)
        return grads[0] @ whole, None, None, None, None


def quantize_shape(model: PreTrainedModel, quantization: Quantization) -> None:
    """Replace every layer that bitsandbytes would quantise by a `QuantizedShape`."""
    kept = get_keys_to_not_convert(model)
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D) and name not in kept:
            parent, _, own = name.rpartition(".")
            stand_in = QuantizedShape(module, BITS[quantization])
            setattr(model.get_submodule(parent), own, stand_in)
