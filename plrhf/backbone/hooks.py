"""Temporary and lasting changes to what a language model computes."""

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


@contextlib.contextmanager
def replaced_first_embeddings(
    table: nn.Module, embeddings: Tensor, *, n_last: int
) -> Iterator[None]:
    """Replace the embeddings of the first L positions by `embeddings` [N, L, e] in this context.

    `generate` can then be called with token ids although rows contain user vectors.

    Args:
        table: the model's input embedding.
        n_last: number of the L positions that are computed first if `Backbone.prefill` has computed the
            others; above 1, since a generated token is computed alone.
    """

    def replace(_module: nn.Module, _inputs: Any, usual: Tensor) -> Tensor:
        n_read = usual.shape[1]
        if n_read >= embeddings.shape[1]:  # the whole row, as where there is no cache
            return torch.cat([embeddings, usual[:, embeddings.shape[1] :]], dim=1)
        return embeddings[:, -n_last:] if n_read == n_last else usual

    handle = table.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def shifted_positions(trunk: nn.Module, first: int) -> Iterator[None]:
    """Add the position of a text's first token to positions counted from 0 in this context."""

    def shift(_module: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + first
        return args, given

    if first == 0:
        yield
        return
    handle = trunk.register_forward_pre_hook(shift, with_kwargs=True)
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
