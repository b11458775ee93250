"""The device and precision of a computation, by which fast paths are chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from plrhf.core.second_order import takes_second_derivatives
from plrhf.core.types import is_fake


def computes_on_cpu(tensor: Tensor) -> bool:
    """Return whether operations on a tensor run on a CPU.

    Fake tensors, which `training.plan` uses in the place of a GPU's, do not count.
    """
    return tensor.is_cpu and not is_fake(tensor)


def trains_on_cpu(tensor: Tensor) -> bool:
    """Return whether operations on a tensor run on a CPU and are differentiated once."""
    once = torch.is_grad_enabled() and not takes_second_derivatives()
    return once and computes_on_cpu(tensor)


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of matrix products of `dtype`: autocast's dtype where autocast is on."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
