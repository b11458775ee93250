"""Trains several settings of one model side by side, on features that are computed already.

Trials of equal structure are one stack of parameters, and a step of all of them is one vmapped call of
the model's own loss. Each trial sees the batches, the starting weights and the dropout masks that
`train.py` would give it with the same seed; its naive twin is that run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import vmap

from plrhf.core.shrinkage import Shrinkage
from plrhf.core.types import PreferenceBatch
from plrhf.data.dataset import PairDataset
from plrhf.data.module import PreferenceData
from plrhf.models.functional import call_method
from plrhf.models.parts import count_pairs
from plrhf.models.reward import PersonalRewardModel
from plrhf.models.train_users import has_found_users

NOT_STACKED = ("backbone.", "val_accuracy.", "val_loss.")
"""Parts of a model that trials share, or that training side by side has no use for."""

Named = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long trials are trained, and what chooses their best weights; see `training.build_trainer`."""

    max_steps: int = -1
    max_epochs: int | None = None
    val_every_n_steps: int | None = None
    patience: int | None = None
    gradient_clip_val: float | None = None
    monitor: Literal["val/loss", "val/accuracy_micro"] = "val/loss"

    @classmethod
    def of(cls, trainer: Any) -> Self:
        """Take over the settings of a trainer that have these names."""
        return cls(**{one.name: getattr(trainer, one.name) for one in fields(cls)})

    def total_steps(self, n_batches: int) -> int:
        """Return the steps after which training ends."""
        limits = [] if self.max_steps == -1 else [self.max_steps]
        limits += [] if self.max_epochs is None else [self.max_epochs * n_batches]
        return min(limits)


@dataclass(frozen=True)
class Trained:
    """What a trial came to: its best value of `Training.monitor`, val loss and accuracy there, the step.

    Attributes:
        vmapped: whether it was trained in one call with others.
    """

    score: float
    val_loss: float
    val_accuracy: float
    step: int
    vmapped: bool = True


class Stack:
    """Weights of T models of one structure, [T, ...] by name, and calls of all of them at once.

    Attributes:
        vmapped: whether one call serves all trials. Parts that `vmap` cannot take are called for one
            trial after the other.
    """

    def __init__(self, models: Sequence[PersonalRewardModel]) -> None:
        self.models, self.template = models, models[0]
        states = [model_state(model) for model in models]
        self.weights = {name: torch.stack([one[name] for one in states]) for name in states[0]}
        self.learned = [
            name
            for name, one in self.template.named_parameters()
            if one.requires_grad and name in self.weights
        ]
        for name in self.learned:
            self.weights[name].requires_grad_()
        modules = self.template.named_modules()
        self.priors = [name for name, part in modules if isinstance(part, Shrinkage)]
        # This reduction keeps what it saw of the users, each trial its own. Of trials that each read pairs
        # of all users, a processor's cache holds one and not several.
        of_losses, of_pairs = (
            self.template.reduction.kind == "tail",
            self.template.encoder.reads_context,
        )
        self.vmapped = not (of_losses or of_pairs)

    def __len__(self) -> int:
        return len(self.models)

    def call(self, method: str, batch: PreferenceBatch) -> tuple[Tensor, ...]:
        """Return what the method returns for each trial, tensors [T, ...]."""

        def one(model: nn.Module, weights: Named) -> tuple[Tensor, ...]:
            return tuple(call_method(model, weights, method, batch))

        state = torch.get_rng_state()
        if self.vmapped and len(self) > 1:  # of a single trial, plain calls cost less
            try:
                return vmap(partial(one, self.template), randomness="same")(self.weights)
            except (RuntimeError, NotImplementedError):  # e.g. a branch that depends on values
                self.vmapped = False
        found = []
        for trial, model in enumerate(self.models):  # all draw the same dropout masks
            torch.set_rng_state(state)
            found.append(one(model, {name: value[trial] for name, value in self.weights.items()}))
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    def train(self, mode: bool) -> None:
        """Switch dropout and the like on or off, also in the template whose trial may have stopped."""
        for model in (self.template, *self.models):
            model.train(mode)

    def finish_users(self, train: PairDataset) -> None:
        """Bring rows of train users to where the steps taken leave them, where models ask for that."""
        if not has_found_users(self.template):
            return
        load_weights(self.models, self.weights)
        for trial, model in enumerate(self.models):
            model.finish_users(lambda: train)
            for name, value in model_state(model).items():
                self.weights[name].data[trial] = value

    def gradients(self, batch: PreferenceBatch) -> Named:
        """Return each trial's gradient of its own training loss, by name of what is learned."""
        loss, _ = self.call("training_loss", batch)
        learned = [self.weights[name] for name in self.learned]
        found = torch.autograd.grad(loss.sum(), learned, allow_unused=True)
        return {
            name: value
            for name, value in zip(self.learned, found, strict=True)
            if value is not None
        }

    def keep(self, kept: Tensor) -> None:
        """Drop all trials but those marked in `kept`, [T] bool."""
        self.models = [model for model, goes_on in zip(self.models, kept, strict=True) if goes_on]
        self.weights = {
            name: one.detach()[kept].requires_grad_(one.requires_grad)
            for name, one in self.weights.items()
        }


def load_weights(models: Sequence[PersonalRewardModel], weights: Named) -> None:
    """Put each trial's weights [T, ...] into its model."""
    for trial, model in enumerate(models):
        own = {name: value[trial].detach().clone() for name, value in weights.items()}
        model.load_state_dict(own, strict=False)


def model_state(model: nn.Module) -> Named:
    """Return parameters and buffers of a model that are its own, by name."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: one.detach() for name, one in named if not name.startswith(NOT_STACKED)}


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


class BestWeights:
    """Keeps each trial's weights where its val score was best, and says who goes on training.

    Attributes:
        patience: validations without progress after which a trial stops; None: it goes on.
        trials: indices [A] of the trials that are still trained.
    """

    def __init__(self, stack: Stack, training: Training) -> None:
        self.patience = training.patience
        self.sign = -1.0 if "accuracy" in training.monitor else 1.0  # the lower, the better
        n_trials = len(stack)
        self.trials = torch.arange(n_trials)
        self.weights = {name: one.detach().clone() for name, one in stack.weights.items()}
        self.best = torch.full((n_trials,), torch.inf, dtype=torch.float64)
        self.found = torch.full((n_trials, 2), torch.nan, dtype=torch.float64)
        self.step = torch.zeros(n_trials, dtype=torch.int64)
        self.waited = torch.zeros(n_trials, dtype=torch.int64)

    def update(self, stack: Stack, score: Tensor, found: Tensor, step: int) -> Tensor:
        """Take a validation of the trials in the stack.

        Args:
            score: [A]. found: val loss and accuracy, [A, 2]. step: steps taken.

        Returns:
            Which of them go on, [A] bool.
        """
        score = self.sign * score
        better = score < self.best[self.trials]
        at = self.trials[better]
        self.waited[self.trials] += 1
        self.waited[at] = 0
        self.best[at], self.found[at], self.step[at] = score[better], found[better], step
        for name, one in stack.weights.items():
            self.weights[name][at] = one.detach()[better]
        goes_on = torch.ones_like(better)
        if self.patience is not None:
            goes_on = self.waited[self.trials] < self.patience
        self.trials = self.trials[goes_on]
        return goes_on

    def results(self, *, vmapped: bool) -> list[Trained]:
        """Return what each trial came to."""
        return [
            Trained(
                score=self.sign * float(best),
                val_loss=float(found[0]),
                val_accuracy=float(found[1]),
                step=int(step),
                vmapped=vmapped,
            )
            for best, found, step in zip(self.best, self.found, self.step, strict=True)
        ]


class Course:
    """The training of one stack, step by step, with random numbers of its own.

    Args:
        models: of one structure. data: train and val pairs. n_batches: in an epoch.
        random_state: of the generator of random numbers, as building the models left it.
    """

    def __init__(
        self,
        models: Sequence[PersonalRewardModel],
        data: PreferenceData,
        training: Training,
        *,
        n_batches: int,
        random_state: Tensor,
    ) -> None:
        self.train, self.training, self.models = data.datasets["train"], training, models
        self.random_state, self.goes_on = random_state, True
        for model in models:
            model.reduction.count(self.train.user_id)
            count_pairs(model, data)
        self.stack = Stack(models)
        total_steps = training.total_steps(n_batches)
        self.optimizer, self.factors = stacked_optimizer(self.stack, total_steps)
        self.best = BestWeights(self.stack, training)
        self.stack.train(True)

    def step(self, step: int, batch: PreferenceBatch) -> None:
        """Take a step on a batch."""
        torch.set_rng_state(self.random_state)
        weigh_priors(self.stack, step)
        gradients = self.stack.gradients(batch)
        if self.training.gradient_clip_val is not None:
            clip(gradients, self.training.gradient_clip_val)
        for model in self.models:
            model.reduction.step()
        self.optimizer.step(gradients, self.factors(step, self.best.trials))
        self.random_state = torch.get_rng_state()

    def validate(self, step: int, val: Sequence[PreferenceBatch]) -> None:
        """Validate after so many steps, and stop the trials that stand still."""
        self.stack.finish_users(self.train)
        found = validate(self.stack, val)
        column = 0 if self.training.monitor == "val/loss" else 1
        kept = self.best.update(self.stack, found[:, column], found, step)
        self.goes_on = bool(kept.any())
        if self.goes_on and not kept.all():
            self.stack.keep(kept)
            self.optimizer.keep(kept, self.stack.weights)

    def end(self) -> list[Trained]:
        """Leave each model with its best weights, and return what each came to."""
        if not bool(self.best.step.any()):  # nothing was ever validated
            self.stack.finish_users(self.train)
            self.best.weights = self.stack.weights
        load_weights(self.models, self.best.weights)
        for model in self.models:
            model.eval()
        return self.best.results(vmapped=self.stack.vmapped)


def train_side_by_side(
    models: Sequence[PersonalRewardModel], data: PreferenceData, training: Training
) -> list[Trained]:
    """Train models of one structure, with the random state that building them left; see `train_groups`."""
    return train_groups([models], data, training, [torch.get_rng_state()])[0]


def train_groups(
    groups: Sequence[Sequence[PersonalRewardModel]],
    data: PreferenceData,
    training: Training,
    random_states: Sequence[Tensor],
) -> list[list[Trained]]:
    """Train groups of models on the same batches, and leave each with its best weights by val.

    Models of a group have one structure; start values and `optim` may differ. Learning rates, schedules,
    clipping, validation, early stopping and random numbers are those of `train.py`.

    Args:
        data: with `PairDataset.hidden`; train and val alone are read.
        random_states: of the generator of random numbers, as building each group's models left it.
    """
    seen = data.restrict_to("train", "val")
    loader = seen.train_dataloader()
    courses = [
        [
            Course(of_stack, seen, training, n_batches=len(loader), random_state=state)
            for of_stack in stacks_of(models)
        ]
        for models, state in zip(groups, random_states, strict=True)
    ]
    every_one, val = list(itertools.chain(*courses)), list(seen.val_dataloader())
    every = training.val_every_n_steps or len(loader)
    for step, batch in enumerate(_batches(loader, training.total_steps(len(loader)))):
        going = [course for course in every_one if course.goes_on]
        if len(going) == 0:
            break
        for course in going:
            course.step(step, batch)
            if len(val) > 0 and (step + 1) % every == 0:
                course.validate(step + 1, val)
    return [[one for course in of_group for one in course.end()] for of_group in courses]


def stacks_of(models: Sequence[PersonalRewardModel]) -> list[Sequence[PersonalRewardModel]]:
    """Divide models of one structure into those of one stack each."""
    if models[0].reduction.kind == "tail":  # each remembers losses of its own
        return [[model] for model in models]
    return [models]


def _batches(loader: Any, n_steps: int) -> Iterator[PreferenceBatch]:
    """Yield the batches of as many epochs as `n_steps` take."""
    done = 0
    while done < n_steps:
        for batch in itertools.islice(loader, n_steps - done):
            yield batch
            done += 1


def validate(stack: Stack, batches: Sequence[PreferenceBatch]) -> Tensor:
    """Return val loss and micro accuracy of each trial, [T, 2] float64."""
    stack.train(False)
    total = torch.zeros(len(stack), 2, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            losses, margins = stack.call("loss", batch)  # each [T, B]
            correct = 0.5 * (margins.sign() + 1)
            total += torch.stack([losses.double().sum(1), correct.double().sum(1)], dim=1)
    stack.train(True)
    return total / sum(len(batch) for batch in batches)
