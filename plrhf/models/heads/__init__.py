"""Reward heads: they compute rewards from pooled hidden states of responses and the user's vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plrhf.core.components import build, named_settings
from plrhf.models.heads.attend import AttendHead
from plrhf.models.heads.base import RewardHead
from plrhf.models.heads.basis import BasisHead
from plrhf.models.heads.decoder import DecoderHead
from plrhf.models.heads.linear import AffineHead, LinearHead, MeanVarianceHead
from plrhf.models.heads.points import CosineHead, DistanceHead

__all__ = [
    "AffineHead",
    "AttendHead",
    "BasisHead",
    "CosineHead",
    "DecoderHead",
    "DistanceHead",
    "HEADS",
    "LinearHead",
    "MeanVarianceHead",
    "RewardHead",
    "build_head",
    "head_settings",
]

HEADS: dict[str, type[RewardHead]] = {
    "linear": LinearHead,
    "attend": AttendHead,
    "distance": DistanceHead,
    "cosine": CosineHead,
    "decoder": DecoderHead,
    "basis": BasisHead,
    "affine": AffineHead,
    "mean_variance": MeanVarianceHead,
}


def head_settings(head: object) -> dict[str, Any]:
    """Return ``model.head``, a name of `HEADS` or a mapping, as a mapping with ``_target_``."""
    return named_settings(head, HEADS, "model.head", "linear")


def build_head(
    head: str | Mapping[str, Any] | RewardHead, *, hidden_size: int, user_dim: int
) -> RewardHead:
    """Build the head of ``model.head`` for an aggregator's hidden states and user vectors."""
    if isinstance(head, RewardHead):
        return head
    settings = head_settings(head)
    found: RewardHead = build(
        settings, "model.head", kind=RewardHead, hidden_size=hidden_size, user_dim=user_dim
    )
    return found
