"""Which device computes, and in what precision: what fast paths are chosen by."""

from __future__ import annotations

import torch
from torch import Tensor

from plrhf.core.types import is_planned


def computes_on_cpu(tensor: Tensor) -> bool:
    """Whether operations on a tensor run on a CPU.

    The tensors of a plan have no values and stand for those of a GPU.
    """
    return tensor.is_cpu and not is_planned(tensor)


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that matrix products of `dtype` are computed in: autocast's where it is on."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
