"""Transformer blocks that use torch.compile in training."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn


class CompiledBlock(nn.Module):
    """Runs a block's forward through torch.compile in training, and as it is in evaluation.

    Evaluation is not compiled because every batch there has another length. Only the block's own
    forward is compiled, since hooks around it (`aggregators.film`) change at every call. The class is
    put in front of a block's own class by `compile_in_training`, and keeps no state.
    """

    plain_class: Any  # the class of the block before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward: Any = self.plain_class.forward
        if self.training:
            forward = _compiled_forward(self.plain_class)
        return forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that pickle cannot find it by its name.
        return _empty_block, (self.plain_class,), self.__getstate__()


def compile_in_training(block: nn.Module) -> None:
    """Make a block use torch.compile in training. The naive twin is the unchanged block."""
    plain_class: Any = type(block)
    block.__class__ = _compiled_class(plain_class)


@cache
def _compiled_class(plain_class: Any) -> type[nn.Module]:
    """Make a subclass of `CompiledBlock` and of a block's own class."""
    name = f"Compiled{plain_class.__name__}"
    return type(name, (CompiledBlock, plain_class), {"plain_class": plain_class})


@cache
def _compiled_forward(plain_class: Any) -> Any:
    """Compile the forward of a block class once. All its blocks share it: weights are its inputs."""
    return torch.compile(plain_class.forward, dynamic=True)


def _empty_block(plain_class: Any) -> nn.Module:
    """Make a block without attributes, for unpickling."""
    kind = _compiled_class(plain_class)
    return kind.__new__(kind)
