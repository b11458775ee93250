"""Second derivatives of losses, which operations with a backward pass of their own do not have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_depth = 0


@contextlib.contextmanager
def second_derivatives() -> Iterator[None]:
    """Compute with operations that autograd can differentiate twice.

    Within it, faster operations whose backward pass is written by hand are replaced by torch's own.
    Outside, they raise RuntimeError under ``create_graph=True``, see `check_differentiated_once`. The
    setting holds for all threads, because recomputed activations may run in autograd's.
    """
    global _depth
    _depth += 1
    try:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            yield
    finally:
        _depth -= 1


def takes_second_derivatives() -> bool:
    """Return whether the caller is within `second_derivatives`."""
    return _depth > 0


def check_differentiated_once() -> None:
    """Refuse to be differentiated twice; called by backward passes that are written by hand.

    torch's ``once_differentiable`` raises only if the second derivative is asked for directly.
    ``torch.autograd.grad`` would leave out what flows through the operation, without an error.

    Raises:
        RuntimeError: gradients are computed with ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True: this operation can be differentiated once only. "
            "Compute the loss within plrhf.core.second_order.second_derivatives()"
        )
