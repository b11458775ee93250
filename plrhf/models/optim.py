"""AdamW with one learning rate for the language model and one for the user model."""

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
"""Learning rate of logarithms of variances. Being logarithms, they need no rate for each scale."""


@check_arguments("optim")
@dataclass(frozen=True, kw_only=True)
class Optim:
    """Settings of the optimiser; arXiv 2402.05133 uses AdamW, lr 5e-5, cosine, 150 warm-up steps.

    Args:
        lr: for the language model (LoRA or full weights).
        user_lr: for the user encoder and for those weights of the aggregator that act on user vectors.
        head_lr: for the reward head and the aggregator's layers on text alone. All are per step.
        weight_decay, user_weight_decay: decoupled decay; the latter is of what has user_lr and acts as
            the prior that keeps users near the generic one.
        shared_steps: steps in which only what all users share is learned, before users begin to differ.
        shrinkage_steps: steps after them over which learned shrinkage grows to its full weight, so that
            users can differ before it is asked whether they do.
        warmup_steps: linear warm-up, then `schedule` ("cosine" to zero at the last step, "constant").
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
        """The optimiser over what is trainable of each part, and its schedule per step."""
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
        """Return learning rate and weight decay of "backbone", "user", "head" or "shrinkage"."""
        return {
            "backbone": (self.lr, self.weight_decay),
            "user": (self.user_lr, self.user_weight_decay),
            "head": (self.head_lr, self.weight_decay),
            "shrinkage": (SHRINKAGE_LR, 0.0),
        }[part]

    def shrinkage_factor(self, step: int) -> float:
        """Return the weight of learned shrinkage in the loss of a step."""
        done = (step + 1 - self.shared_steps) / max(1, self.shrinkage_steps)
        return min(1.0, max(0.0, done))

    def factor(self, total_steps: int, part: str = "head") -> Callable[[int], float]:
        """Step -> factor on the learning rate of a part; that of users begins after `shared_steps`."""
        first = self.shared_steps if part in ("user", "shrinkage") else 0

        def at(step: int) -> float:
            step -= first
            if step < 0:
                return 0.0
            if step < self.warmup_steps:
                return (step + 1) / (self.warmup_steps + 1)
            if self.schedule == "constant":
                return 1.0
            done = (step - self.warmup_steps) / max(1, total_steps - first - self.warmup_steps)
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

        return at


class RowAdamW(AdamW):
    """AdamW that, where a table's gradient is sparse, touches only the rows that have one.

    A row's moments stand still while it has no gradient (as in `torch.optim.SparseAdam`), so such a
    row does not move on by momentum; its decoupled decay is made up by `catch_up`, exactly. So a
    step costs as much with a million users as with a hundred.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, fused=True)
        # Scaled gradients (precision=16-mixed) are unscaled, and then clipped, before the step.
        self._step_supports_amp_scaling = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; of dense gradients that of AdamW."""
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
        state, (beta1, beta2) = self.state[table], group["betas"]
        if len(state) == 0:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
            state["log_decay"] = 0.0  # of the table so far
            state["row_decay"] = torch.zeros(len(table), device=table.device)  # made up, each row
        state["step"] += 1
        state["log_decay"] += math.log1p(-group["lr"] * group["weight_decay"])
        rows, values = gradient.indices()[0], gradient.values()
        self._catch_up(table, rows)
        mean = state["exp_avg"][rows].lerp_(values, 1 - beta1)
        square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(values, values, value=1 - beta2)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        n_steps = state["step"].item()
        size = group["lr"] / (1 - beta1**n_steps)
        scale = (square / (1 - beta2**n_steps)).sqrt_().add_(group["eps"])
        table.index_add_(0, rows, mean / scale, alpha=-size)

    def catch_up(self, rows: Tensor | None = None) -> None:
        """Decay the rows [B] of sparse tables (None: all) as far as the steps taken ask for."""
        for table, state in self.state.items():
            if "row_decay" in state:
                every = torch.arange(len(table), device=table.device)
                self._catch_up(table, every if rows is None else rows.unique())

    @torch.no_grad()
    def _catch_up(self, table: Tensor, rows: Tensor) -> None:
        state = self.state[table]
        due = state["log_decay"] - state["row_decay"][rows]
        table[rows] *= due.exp()[:, None]
        state["row_decay"][rows] += due


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale all gradients, sparse ones among them, to a total 2-norm of at most `max_norm`."""
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
