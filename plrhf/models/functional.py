"""Calls methods of a model with weights other than its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class _Call(nn.Module):
    """Wraps a model so that `functional_call`, which calls `forward`, can call any of its methods."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *arguments: Any) -> Any:
        return getattr(self.model, method)(*arguments)


def call_method(
    model: nn.Module, weights: Mapping[str, Tensor], method: str, *arguments: Any
) -> Any:
    """Call a model's method while parameters and buffers of these names have these values.

    `torch.func` can differentiate and vectorise the call.
    """
    named = {f"model.{name}": value for name, value in weights.items()}
    return functional_call(_Call(model), named, (method, *arguments), tie_weights=False)
