"""Weights of several models of one structure, and calls of all of them at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vmap

from plrhf.core.shrinkage import Shrinkage
from plrhf.core.types import PreferenceBatch
from plrhf.data.dataset import PairDataset
from plrhf.models.functional import call_method
from plrhf.models.reward import PersonalRewardModel
from plrhf.models.train_users import has_found_users

NOT_STACKED = ("backbone.", "val_accuracy.", "val_loss.")
"""Parts of a model that trials share, or that training side by side has no use for."""

Named = dict[str, Tensor]


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
