"""The val metric that chooses the best checkpoint and stops a training."""

from __future__ import annotations

from typing import Literal

Monitor = Literal[
    "val/loss", "val/accuracy_micro", "val/accuracy_macro", "val/nll", "val/true_preference"
]


def higher_is_better(metric: str) -> bool:
    """Return whether a metric is better the higher it is: accuracies and the true preference."""
    return "accuracy" in metric or "true_preference" in metric
