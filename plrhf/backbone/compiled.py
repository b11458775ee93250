"""Transformer blocks that train by torch.compile."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn


class CompiledBlock(nn.Module):
    """Runs a block's forward by torch.compile while it trains, and plainly otherwise.

    Texts and margins, whose lengths all differ, are not worth compiling. Hooks around the block, as
    `aggregators.film` sets them, are new at every call, so only its own forward is compiled. The class
    stands in front of a block's own class, see `compile_in_training`; nothing is kept in the block.
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
    """Let a block run by torch.compile while it trains; its naive twin is the block before."""
    plain_class: Any = type(block)
    block.__class__ = _compiled_class(plain_class)


@cache
def _compiled_class(plain_class: Any) -> type[nn.Module]:
    name = f"Compiled{plain_class.__name__}"
    return type(name, (CompiledBlock, plain_class), {"plain_class": plain_class})


@cache
def _compiled_forward(plain_class: Any) -> Any:
    """One compiled forward for all blocks of a class: their weights are its inputs."""
    return torch.compile(plain_class.forward, dynamic=True)


def _empty_block(plain_class: Any) -> nn.Module:
    kind = _compiled_class(plain_class)
    return kind.__new__(kind)
