"""AdamW with separate learning rates for language model, user model and head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from plrhf.core.checks import NonNegativeFloat, NonNegativeInt, PositiveFloat, check_arguments

SHRINKAGE_LR = 0.03
"""Learning rate of log-variances, which needs no tuning because logarithms have no scale."""


@check_arguments("optim")
@dataclass(frozen=True, kw_only=True)
class Optim:
    """Settings of the optimiser; arXiv 2402.05133 uses AdamW, lr 5e-5, cosine, 150 warm-up steps.

    Args:
        lr: learning rate of the language model (LoRA or full weights).
        user_lr: of the user encoder, and of the aggregator's weights that act on user vectors.
        head_lr: of the reward head, and of the aggregator's layers that act on text alone.
        weight_decay: decoupled decay of language model and head.
        user_weight_decay: decoupled decay of what has user_lr; it is a prior that keeps users near the
            generic user.
        shared_steps: number of first steps in which user_lr is 0, so that only shared parameters learn.
        shrinkage_steps: number of steps after these in which the weight of learned shrinkage grows from
            0 to 1.
        warmup_steps: linear warm-up; a tenth of a training that has fewer steps. schedule: afterwards,
            ``cosine`` (to 0 at the last step) or ``constant``.
    """

    lr: PositiveFloat = 5e-5
    user_lr: PositiveFloat = 5e-4
    head_lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    user_weight_decay: NonNegativeFloat = 0.0
    shared_steps: NonNegativeInt = 0
    shrinkage_steps: NonNegativeInt = 200
    warmup_steps: NonNegativeInt = 150
    schedule: Literal["cosine", "constant"] = "cosine"

    def build(
        self,
        *,
        backbone: Iterable[nn.Parameter],
        user: Iterable[nn.Parameter],
        head: Iterable[nn.Parameter],
        shrinkage: Iterable[nn.Parameter] = (),
        total_steps: int,
    ) -> tuple[RowAdamW, LambdaLR]:
        """Build the optimiser over the trainable parameters of each part, and its schedule by step."""
        parts = {"backbone": backbone, "user": user, "head": head, "shrinkage": shrinkage}
        groups: list[dict[str, Any]] = []
        for part, parameters in parts.items():
            lr, decay = self.rate_and_decay(part)
            learned = [one for one in parameters if one.requires_grad]
            groups.append({"params": learned, "lr": lr, "weight_decay": decay, "name": part})
        optimizer = RowAdamW([group for group in groups if group["params"]])
        factors = [self.factor(total_steps, group["name"]) for group in optimizer.param_groups]
        return optimizer, LambdaLR(optimizer, factors)

    def rate_and_decay(self, part: str) -> tuple[float, float]:
        """Return learning rate and weight decay of a part: "backbone", "user", "head" or "shrinkage"."""
        return {
            "backbone": (self.lr, self.weight_decay),
            "user": (self.user_lr, self.user_weight_decay),
            "head": (self.head_lr, self.weight_decay),
            "shrinkage": (SHRINKAGE_LR, 0.0),
        }[part]

    def shrinkage_factor(self, step: int) -> float:
        """Return the weight of learned shrinkage in the loss at a step."""
        done = (step + 1 - self.shared_steps) / max(1, self.shrinkage_steps)
        return min(1.0, max(0.0, done))

    def warmup(self, total_steps: int) -> int:
        """Return the steps of warm-up in a training of so many."""
        return self.warmup_steps if self.warmup_steps <= total_steps else total_steps // 10

    def factor(self, total_steps: int, part: str = "head") -> Callable[[int], float]:
        """Return the function step -> factor on the learning rate of a part."""
        first = self.shared_steps if part in ("user", "shrinkage") else 0
        warmup = self.warmup(total_steps)

        def at(step: int) -> float:
            step -= first
            if step < 0:
                return 0.0
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if self.schedule == "constant":
                return 1.0
            done = (step - warmup) / max(1, total_steps - first - warmup)
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

        return at


class RowAdamW(AdamW):
    """AdamW that updates only the rows with a gradient of tables that have sparse gradients.

    A row's moments do not change while it has no gradient, as in `torch.optim.SparseAdam`, so momentum
    does not move it. The weight decay that it misses is applied later by `apply_delayed_decay`,
    exactly. A step thus costs the same with a million users as with a hundred.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, fused=True)
        # Scaled gradients (precision=16-mixed) are unscaled, and then clipped, before the step.
        self._step_supports_amp_scaling = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters with dense gradients are updated by AdamW."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = [
            (group, table, table.grad.coalesce())
            for group in self.param_groups
            for table in group["params"]
            if table.grad is not None and table.grad.is_sparse
        ]
        for _, table, _ in tables:
            table.grad = None
        super().step()
        for group, table, gradient in tables:
            self._step_rows(group, table, gradient)
        return loss

    @torch.no_grad()
    def _step_rows(self, group: dict[str, Any], table: Tensor, gradient: Tensor) -> None:
        """Update the rows of a table that its sparse gradient has."""
        state, (beta1, beta2) = self.state[table], group["betas"]
        if len(state) == 0:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
            state["log_decay"] = 0.0  # of the table so far
            state["row_decay"] = torch.zeros(len(table), device=table.device)  # made up, each row
        state["step"] += 1
        state["log_decay"] += math.log1p(-group["lr"] * group["weight_decay"])
        rows, values = gradient.indices()[0], gradient.values()
        self._apply_delayed_decay(table, rows)
        mean = state["exp_avg"][rows].lerp_(values, 1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        n_steps = state["step"].item()
        size = group["lr"] / (1 - beta1**n_steps)
        scale = (square / (1 - beta2**n_steps)).sqrt_().add_(group["eps"])
        table.index_add_(0, rows, mean / scale, alpha=-size)

    def apply_delayed_decay(self, rows: Tensor | None = None) -> None:
        """Apply the weight decay that rows [B] of all sparse tables have missed so far; None: all rows."""
        for table, state in self.state.items():
            if "row_decay" in state:
                every = torch.arange(len(table), device=table.device)
                self._apply_delayed_decay(table, every if rows is None else rows)

    @torch.no_grad()
    def _apply_delayed_decay(self, table: Tensor, rows: Tensor) -> None:
        """Apply the weight decay that rows of one table have missed."""
        state = self.state[table]
        due = state["log_decay"] - state["row_decay"][rows]
        table[rows] *= due.exp()[:, None]  # a row named twice is written twice, and alike
        state["row_decay"][rows] += due


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale all gradients, dense and sparse, so that their total 2-norm is at most `max_norm`."""
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    total = torch.nn.utils.get_total_norm(values)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(scale)
