"""Logits in float32 from weights in a narrower dtype, where small differences matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from plrhf.backbone.model import Backbone


class _LinearInFloat32(TorchFunctionMode):
    """Computes linear layers in float32 if their input is float32, whatever their weights are."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and len(args) > 1 and args[0].dtype == torch.float32:
            args = tuple(one if one is None else one.float() for one in args)
            kwargs = {name: None if one is None else one.float() for name, one in kwargs.items()}
        return func(*args, **kwargs)


def unembed_in_float32(backbone: Backbone) -> Callable[[Tensor], Tensor]:
    """Return a function that computes logits [N, V] from hidden states [N, d], both in float32.

    bfloat16 rounds hidden states and logits by up to 0.4 per cent. A user vector that acts on the last
    hidden states changes them by less.
    """

    def unembed(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False), _LinearInFloat32():
            return backbone.unembed(hidden.float())

    return unembed
