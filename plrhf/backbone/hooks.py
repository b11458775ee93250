"""Temporary and lasting changes to a language model for training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def replaced_output(module: nn.Module, output: Tensor | None) -> Iterator[None]:
    """Make a module return `output` [R, L, e] in this context; None changes nothing."""
    if output is None:
        yield
        return

    def replace(_module: nn.Module, _inputs: Any, usual: Tensor) -> Tensor:
        return torch.cat([output, usual[:, output.shape[1] :]], dim=1)  # some pad their rows inside

    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def switch_dropout_off(model: nn.Module) -> None:
    """Set all dropout rates of a model to 0.

    Policy and reference must be the same function before the first step, so neither may have dropout.
    The model's config, which is saved with it, keeps its rates.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
