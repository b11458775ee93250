"""The optimiser of a stack of models: each has its own learning rates, decays and gradient norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from plrhf.referee.stack import Named, Stack


class StackedAdamW:
    """AdamW on stacked weights, each trial with its own learning rates and decays (torch.optim.AdamW).

    Args:
        weights: [T, ...] by name. rates, decays: by name, one a trial, [T].
    """

    def __init__(
        self,
        weights: Named,
        *,
        rates: Named,
        decays: Named,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.weights, self.rates, self.decays = weights, rates, decays
        self.betas, self.eps = betas, eps
        self.mean = {name: torch.zeros_like(one) for name, one in weights.items()}
        self.square = {name: torch.zeros_like(one) for name, one in weights.items()}
        self.n_steps: dict[str, int] = dict.fromkeys(weights, 0)

    def keep(self, kept: Tensor, weights: Named) -> None:
        """Drop all trials but those marked in `kept`, [T] bool; `weights` are theirs."""
        for name in self.weights:
            self.weights[name] = weights[name]
            for values in (self.rates, self.decays, self.mean, self.square):
                values[name] = values[name][kept]

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], factors: Named) -> None:
        """Take a step of `rates` times `factors` [T]; what has no gradient stays as it is."""
        beta1, beta2 = self.betas
        for name, gradient in gradients.items():
            weight, mean, square = self.weights[name], self.mean[name], self.square[name]
            self.n_steps[name] += 1
            shape = (-1, *[1] * (weight.dim() - 1))
            rate = (self.rates[name] * factors[name]).view(shape)
            weight.mul_(1 - rate * self.decays[name].view(shape))
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            correction = (1 - beta2 ** self.n_steps[name]) ** 0.5
            change = mean / (square.sqrt().div_(correction).add_(self.eps))
            weight.sub_(change.mul_(rate / (1 - beta1 ** self.n_steps[name])))


def stacked_optimizer(
    stack: Stack, total_steps: int
) -> tuple[StackedAdamW, Callable[[int, Tensor], Named]]:
    """Return AdamW with the learning rates of each model's `Optim`, and their factors at a step.

    The factors [A] are of the trials at indices [A].
    """
    groups = stack.template.trainable_parts()
    part_of = {id(one): part for part, found in groups.items() for one in found}
    names = dict(stack.template.named_parameters())
    optims = [model.optim for model in stack.models]
    rates, decays, schedules = {}, {}, {}
    for name in stack.learned:
        part = part_of[id(names[name])]
        found = torch.tensor([one.rate_and_decay(part) for one in optims])  # [T, 2]
        rates[name], decays[name] = found.unbind(dim=1)
        schedules[name] = [one.factor(total_steps, part) for one in optims]
    learned = {name: stack.weights[name] for name in stack.learned}
    optimizer = StackedAdamW(learned, rates=rates, decays=decays)

    def factors(step: int, trials: Tensor) -> Named:
        return {
            name: torch.tensor([each[trial](step) for trial in trials.tolist()])
            for name, each in schedules.items()
        }

    return optimizer, factors


def weigh_priors(stack: Stack, step: int) -> None:
    """Give learned shrinkage the weight that it has in the loss of a step, each trial its own."""
    factors = [model.optim.shrinkage_factor(step) for model in stack.models]
    for name in stack.priors:
        stack.weights[f"{name}.weight"] = torch.tensor(factors)
        stack.weights[f"{name}.step"] = torch.full((len(stack),), step)


def clip(gradients: Named, max_norm: float) -> None:
    """Scale each trial's gradients to a total 2-norm of at most `max_norm`, in place."""
    squares = [one.flatten(1).square().sum(dim=1) for one in gradients.values()]
    scale = (max_norm / (torch.stack(squares).sum(dim=0).sqrt() + 1e-6)).clamp(max=1.0)
    for one in gradients.values():
        one.mul_(scale.view(-1, *[1] * (one.dim() - 1)))
