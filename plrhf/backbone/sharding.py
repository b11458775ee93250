"""Helpers for parameters that DeepSpeed shards over processes; deepspeed is imported only if needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def gathered(parameters: Sequence[Tensor], *, write: bool = False) -> Iterator[None]:
    """Make sharded parameters whole on every process in this context.

    Args:
        write: whether all processes take over what rank 0 writes into them.
    """
    sharded = [one for one in parameters if is_sharded(one)]
    if len(sharded) == 0:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


@contextlib.contextmanager
def writable_part(tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield the part of a tensor that this process must write when all processes fill it together.

    For a sharded parameter this is the process's shard, without padding. A shard that is offloaded to
    NVMe is gathered instead, and rank 0 gets all of it.

    Returns:
        The part as a flat tensor, and the index of its first number in the whole tensor.
    """
    if not is_sharded(tensor):
        yield tensor.detach().view(-1), 0
    elif tensor.ds_tensor.final_location is None:  # type: ignore[attr-defined]
        whole: Any = tensor
        first = first_of_shard(whole)
        yield whole.ds_tensor[: max(0, whole.ds_numel - first)], first
    else:
        with gathered([tensor], write=True):
            writes = torch.distributed.get_rank() == 0
            yield tensor.detach().view(-1) if writes else tensor.new_empty(0), 0


def first_of_shard(parameter: Any) -> int:
    """Return the index, in a whole sharded parameter, of the first number of this process's shard."""
    return torch.distributed.get_rank(parameter.ds_process_group) * len(parameter.ds_tensor)


def is_sharded(parameter: Tensor) -> bool:
    """Return whether this process holds only a shard of a parameter, unless it is `gathered`."""
    return hasattr(parameter, "ds_id")


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole tensor, also if this process holds only a shard."""
    return tensor.ds_shape if is_sharded(tensor) else tensor.shape  # type: ignore[attr-defined]
