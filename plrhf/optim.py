"""AdamW with one learning rate for the language model and one for the user model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from plrhf.errors import bad_value

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Settings of the optimiser; arXiv 2402.05133 uses AdamW, lr 5e-5, cosine, 150 warm-up steps.

    Args:
        lr: for the language model (LoRA or full weights). user_lr: for user encoder and aggregator,
            but for the aggregator's layers on text alone.
        head_lr: for the reward head and those layers. Each > 0, per step.
        weight_decay, user_weight_decay: decoupled decay of the two, >= 0; the latter also acts as
            the prior that keeps users near the generic one.
        warmup_steps: linear warm-up, then `schedule` ("cosine" to zero at the last step, "constant").
    """

    lr: float = 5e-5
    user_lr: float = 5e-4
    head_lr: float = 1e-3
    weight_decay: float = 0.0
    user_weight_decay: float = 0.0
    warmup_steps: int = 150
    schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        for name in ("lr", "user_lr", "head_lr"):
            value = getattr(self, name)
            if not value > 0:
                raise bad_value(
                    f"optim.{name}", value, "a number above 0", f"Set optim.{name}=1e-4"
                )
        for name in ("weight_decay", "user_weight_decay", "warmup_steps"):
            value = getattr(self, name)
            if value < 0:
                raise bad_value(f"optim.{name}", value, "a number from 0", f"Set optim.{name}=0")
        if self.schedule not in SCHEDULES:
            raise bad_value(
                "optim.schedule", self.schedule, " or ".join(SCHEDULES), "Set optim.schedule=cosine"
            )

    def build(
        self,
        *,
        backbone: Iterable[nn.Parameter],
        user: Iterable[nn.Parameter],
        head: Iterable[nn.Parameter],
        total_steps: int,
    ) -> tuple[AdamW, LambdaLR]:
        """The optimiser over what is trainable of each part, and its schedule per step."""
        groups = [
            {"params": backbone, "lr": self.lr, "weight_decay": self.weight_decay, "name": "lm"},
            {
                "params": user,
                "lr": self.user_lr,
                "weight_decay": self.user_weight_decay,
                "name": "user",
            },
            {"params": head, "lr": self.head_lr, "weight_decay": self.weight_decay, "name": "head"},
        ]
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]  # type: ignore[attr-defined]
        optimizer = AdamW([group for group in groups if group["params"]])
        return optimizer, LambdaLR(optimizer, self.factor(total_steps))

    def factor(self, total_steps: int) -> Callable[[int], float]:
        """Step -> factor on every learning rate."""

        def at(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / (self.warmup_steps + 1)
            if self.schedule == "constant":
                return 1.0
            done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

        return at
