"""Parameters of which each process holds a shard: what is asked of DeepSpeed's, imported when met."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def gathered(parameters: Sequence[Tensor], *, write: bool = False) -> Iterator[None]:
    """Within it sharded parameters are whole on every process; others always are.

    Args:
        write: what rank 0 writes into them is what all processes have afterwards.
    """
    sharded = [one for one in parameters if is_sharded(one)]
    if len(sharded) == 0:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


@contextlib.contextmanager
def own_part(tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Within it: the numbers of a tensor that this process is to write, so that all are written.

    Of a sharded parameter those of its shard, without the padding at its end: no process holds the
    whole. Shards that wait on NVMe are made whole, for rank 0 to write.

    Returns:
        The numbers, flat, and the place of the first of them in the whole tensor.
    """
    if not is_sharded(tensor):
        yield tensor.detach().view(-1), 0
    elif tensor.ds_tensor.final_location is None:  # type: ignore[attr-defined]
        whole: Any = tensor
        first = torch.distributed.get_rank(whole.ds_process_group) * len(whole.ds_tensor)
        yield whole.ds_tensor[: max(0, whole.ds_numel - first)], first
    else:
        with gathered([tensor], write=True):
            writes = torch.distributed.get_rank() == 0
            yield tensor.detach().view(-1) if writes else tensor.new_empty(0), 0


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process has but a shard of a parameter, unless it is `gathered`."""
    return hasattr(parameter, "ds_id")


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a tensor of which this process may have but a shard."""
    return tensor.ds_shape if is_sharded(tensor) else tensor.shape  # type: ignore[attr-defined]
