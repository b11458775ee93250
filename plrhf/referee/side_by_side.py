"""Trains several settings of one model side by side, on features that are computed already.

Trials of equal structure are one stack of parameters, and a step of all of them is one vmapped call of
the model's own loss. Each trial sees the batches, the starting weights and the dropout masks that
`train.py` would give it with the same seed; its naive twin is that run. Trials that val says cannot win
may stop early (`halve`), which changes nothing for the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from plrhf.core.checks import check_arguments
from plrhf.core.monitor import higher_is_better
from plrhf.core.types import PreferenceBatch
from plrhf.data.module import PreferenceData
from plrhf.models.parts import count_pairs
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee.stack import Stack, load_weights, validate
from plrhf.referee.stacked_optim import clip, stacked_optimizer, weigh_priors


@check_arguments("trainer")
@dataclass(frozen=True, kw_only=True)
class Training:
    """How long trials are trained, and what chooses their best weights; see `training.build_trainer`.

    Attributes:
        halvings: shares of the steps after each of which only the better half of all trials goes on,
            see `halve`; the others are of the trainer.
    """

    max_steps: int = -1
    max_epochs: int | None = None
    val_every_n_steps: int | None = None
    patience: int | None = None
    gradient_clip_val: float | None = None
    monitor: Literal["val/loss", "val/accuracy_micro"] = "val/loss"
    halvings: Sequence[float] = ()

    @classmethod
    def of(cls, trainer: Any, halvings: Sequence[float] = ()) -> Self:
        """Take over the settings of a trainer."""
        return cls(
            max_steps=trainer.max_steps,
            max_epochs=trainer.max_epochs,
            val_every_n_steps=trainer.val_every_n_steps,
            patience=trainer.patience,
            gradient_clip_val=trainer.gradient_clip_val,
            monitor=trainer.monitor,
            halvings=halvings,
        )

    def total_steps(self, n_batches: int) -> int:
        """Return the steps after which training ends."""
        limits = [] if self.max_steps == -1 else [self.max_steps]
        limits += [] if self.max_epochs is None else [self.max_epochs * n_batches]
        return min(limits)

    def halving_steps(self, n_batches: int) -> set[int]:
        """Return the steps after which trials are halved: the first validation after each share."""
        total, every = self.total_steps(n_batches), self.val_every_n_steps or n_batches
        found = {every * math.ceil(share * total / every) for share in self.halvings}
        return {step for step in found if 0 < step < total}


@dataclass(frozen=True)
class Trained:
    """What a trial came to: its best value of `Training.monitor`, val loss and accuracy there, the step.

    Attributes:
        n_steps: how many steps it was trained for.
        vmapped: whether it was trained in one call with others.
    """

    score: float
    val_loss: float
    val_accuracy: float
    step: int
    n_steps: int
    vmapped: bool = True


class BestWeights:
    """Keeps each trial's weights where its val score was best, and says who goes on training.

    Attributes:
        patience: validations without progress after which a trial stops; None: it goes on.
        trials: indices [A] of the trials that are still trained.
        racing: which trials no halving has stopped, [T] bool.
    """

    def __init__(self, stack: Stack, training: Training) -> None:
        self.patience = training.patience
        self.sign = -1.0 if higher_is_better(training.monitor) else 1.0  # the lower, the better
        n_trials = len(stack)
        self.trials = torch.arange(n_trials)
        self.racing = torch.ones(n_trials, dtype=torch.bool)
        self.weights = {name: one.detach().clone() for name, one in stack.weights.items()}
        self.best = torch.full((n_trials,), torch.inf, dtype=torch.float64)
        self.found = torch.full((n_trials, 2), torch.nan, dtype=torch.float64)
        self.step = torch.zeros(n_trials, dtype=torch.int64)
        self.n_steps = torch.zeros(n_trials, dtype=torch.int64)
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

    def halve(self, kept: Tensor) -> Tensor:
        """Stop the trials that are not in `kept`, [T] bool; return which of those trained go on, [A]."""
        self.racing &= kept
        goes_on = self.racing[self.trials]
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
                n_steps=int(n_steps),
                vmapped=vmapped,
            )
            for best, found, step, n_steps in zip(
                self.best, self.found, self.step, self.n_steps, strict=True
            )
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
        self.best.n_steps[self.best.trials] += 1
        self.random_state = torch.get_rng_state()

    def validate(self, step: int, val: Sequence[PreferenceBatch]) -> None:
        """Validate after so many steps, and stop the trials that stand still."""
        self.stack.finish_users(self.train)
        found = validate(self.stack, val)
        column = 0 if self.training.monitor == "val/loss" else 1
        self.keep(self.best.update(self.stack, found[:, column], found, step))

    def keep(self, kept: Tensor) -> None:
        """Go on with the trials marked in `kept` alone, [A] bool of those that are still trained."""
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
    every, halvings = training.val_every_n_steps or len(loader), training.halving_steps(len(loader))
    for step, batch in enumerate(_batches(loader, training.total_steps(len(loader)))):
        going = [course for course in every_one if course.goes_on]
        if len(going) == 0:
            break
        for course in going:
            course.step(step, batch)
            if len(val) > 0 and (step + 1) % every == 0:
                course.validate(step + 1, val)
        if len(val) > 0 and step + 1 in halvings:
            halve(every_one)
    return [[one for course in of_group for one in course.end()] for of_group in courses]


def halve(courses: Sequence[Course]) -> None:
    """Stop the worse half of the trials of all courses, by each trial's best val score so far.

    Successive halving (Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and
    hyperparameter optimization"). Trials that stand still (`Training.patience`) count with their best.
    """
    scores = torch.cat([course.best.best for course in courses])
    racing = torch.cat([course.best.racing for course in courses])
    n_kept = math.ceil(int(racing.sum()) / 2)
    kept = torch.zeros_like(racing)
    kept[scores.masked_fill(~racing, torch.inf).argsort(stable=True)[:n_kept]] = True
    sizes = [len(course.best.racing) for course in courses]
    for course, of_course in zip(courses, kept.split(sizes), strict=True):
        course.keep(course.best.halve(of_course))


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
