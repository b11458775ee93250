"""Hashes of a backbone's frozen weights, by which cached values and exports know it again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from plrhf.backbone.sharding import gathered


def fingerprint(backbone: nn.Module) -> str:
    """Hash the frozen weights to sixteen hexadecimal digits, by their rounded sums.

    The hash does not depend on the device. It is quick, and tells models apart; for a hash of all bits
    see `digest`.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, value in _frozen_weights(backbone):
        # Summed in double, whose rounding by device and thread count four digits hide.
        total = float(value.double().sum())
        digest.update(f"{name} {tuple(value.shape)} {total:.4e}".encode())
    return digest.hexdigest()


def digest(backbone: nn.Module) -> str:
    """Hash every bit of the frozen weights to thirty-two hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in _frozen_weights(backbone):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        numbers = value.cpu().contiguous().view(-1)  # a 0-dim one too
        bits: Any = numbers.view(torch.uint8).numpy()
        digest.update(bits)
    return digest.hexdigest()


def _frozen_weights(backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the frozen weights by name, sorted; a sharded one is whole until the next is asked for."""
    for name, value in sorted(backbone.named_parameters()):
        if not value.requires_grad:
            with gathered([value]):
                yield name, value.detach()
