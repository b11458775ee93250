"""Initialises a reward model from the train pairs before the first step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities import move_data_to_device
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from plrhf.core.checks import Fraction, NonNegativeFloat, PositiveFloat, check_arguments
from plrhf.core.components import build, named_settings
from plrhf.core.errors import BadValue, bad_value
from plrhf.core.mixed_logit import MixedLogit, Pairs
from plrhf.data.dataset import PairDataset
from plrhf.data.module import PreferenceData
from plrhf.encoders import LookupEncoder
from plrhf.models.factors import (
    Factors,
    are_judged_by_several_users,
    factors_of_coefficients,
    factors_of_judgments,
    principal_directions,
    truncated_svd,
)
from plrhf.models.heads import AffineHead, BasisHead, LinearHead
from plrhf.models.parts import count_pairs, weigh_priors

if TYPE_CHECKING:
    from plrhf.models.reward import PersonalRewardModel

_FACTORS: WeakKeyDictionary[PairDataset, dict[tuple[Any, ...], Factors]] = WeakKeyDictionary()
"""Factors of train pairs, since trials that differ in learning rates start alike."""

_FITS: WeakKeyDictionary[PairDataset, dict[tuple[Any, ...], tuple[Tensor, MixedLogit]]] = (
    WeakKeyDictionary()
)
"""Directions of train pairs, and their mixed logit with learned variances, the same for every `spread`."""


class Start(ABC):
    """Initialises a reward model, once pooled trunk outputs are known.

    Attributes:
        reads_pairs: whether it takes every train pair for a choice of the first response.
    """

    reads_pairs: bool = True

    @abstractmethod
    def apply(self, model: PersonalRewardModel, data: PreferenceData, *, total_steps: int) -> None:
        """Set parameters of the model in place.

        Args:
            data: only its train pairs are used. total_steps: number of optimiser steps of the training.

        Raises:
            ValueError: the model's parts cannot be initialised in this way.
        """


class RandomStart(Start):
    """Keeps the random initial values of all parts."""

    reads_pairs = False

    def apply(self, model: PersonalRewardModel, data: PreferenceData, *, total_steps: int) -> None:
        pass


class PcaStart(Start):
    """Initialises the directions of a `BasisHead` with principal components of h_chosen - h_rejected.

    The differences are not centred. Each component is divided by the standard deviation of its margins,
    and its sign is chosen so that most train pairs agree with it.

    Args:
        reverses: use half as many components, each also with the opposite sign, for weights that cannot
            be negative (DRM: Luo et al. 2025, arXiv 2502.13131). None: if the head's weights are
            softmax.
    """

    def __init__(self, *, reverses: bool | None = None) -> None:
        self.reverses = reverses

    def apply(self, model: PersonalRewardModel, data: PreferenceData, *, total_steps: int) -> None:
        head = _basis_head(model)
        rank, width = head.basis.weight.shape
        reverses = head.weights == "softmax" if self.reverses is None else self.reverses
        n_components = -(-rank // 2) if reverses else rank
        if n_components > width:
            allowed = f"at most as many components as features, {width}"
            raise bad_value("aggregator.user_dim", rank, allowed, "Set aggregator.user_dim=8")
        differences = text_differences(model, data.datasets["train"])
        found = principal_directions(differences, n_components)
        if reverses:
            found = torch.stack([found, -found], dim=1).flatten(0, 1)[:rank]
        _set(head.basis.weight, found / head.scale)


class MixedLogitStart(Start):
    """Initialises all of a model linear in h as a mixed logit, whose variances are learned too.

    The directions of the `BasisHead` become the first principal components of h_chosen - h_rejected, the
    shared direction and the users' numbers what `core.mixed_logit` finds. A layer in front of the head
    keeps its random weights, so that it gives random features. Nothing is left for training, whose
    learning rates should be small.

    Args:
        spread: factor of the variances, which val pairs may choose.
    """

    def __init__(self, *, spread: PositiveFloat = 1.0) -> None:
        self.spread = spread

    def apply(self, model: PersonalRewardModel, data: PreferenceData, *, total_steps: int) -> None:
        head, encoder, pairs = _basis_head(model), model.encoder, data.datasets["train"]
        if head.shared is None:
            raise _no_start("mixed_logit", "a shared direction", "model.head.shared=true")
        if not isinstance(encoder, LookupEncoder) or encoder.basis is not None:
            cure = "encoder=lookup encoder.rank=null"
            raise _no_start("mixed_logit", "encoder=lookup with rank null", cure)
        differences = text_differences(model, pairs)
        rank, n_users = head.basis.weight.shape[0], len(encoder.offsets.weight) - 1
        key, known = _key(model, pairs, rank, n_users), _FITS.setdefault(pairs, {})
        directions = known[key][0] if key in known else truncated_svd(differences, rank)[2]
        choices = Pairs(differences, differences @ directions.T, pairs.user_id - 1, n_users)
        if key not in known:
            known[key] = (directions, choices.learn_variances())
        fit = choices.most_likely(known[key][1], spread=self.spread)
        _set(head.basis.weight, directions / head.scale)
        _set(head.shared.weight, fit.shared[None] / head.scale)
        _set(encoder.generic_vector, torch.zeros(rank))
        _set(encoder.offsets.weight[1:], fit.own)


class SvdStart(Start):
    """Initialises users and directions by a truncated SVD of the choices (PReF, arXiv 2503.06358).

    If most pairs of texts are judged by several users, it factorises the matrix of users by pairs,
    whose gaps are imputed in `IMPUTING_ROUNDS` rounds, and regresses the pairs' factors on h_chosen -
    h_rejected. Otherwise it factorises the matrix of ridge regression coefficients of each user.

    Args:
        ridge: penalty of these regressions, as a multiple of the mean square of h_chosen - h_rejected.
    """

    def __init__(self, *, ridge: NonNegativeFloat = 1.0) -> None:
        self.ridge = ridge

    def apply(self, model: PersonalRewardModel, data: PreferenceData, *, total_steps: int) -> None:
        head, encoder, pairs = _basis_head(model), model.encoder, data.datasets["train"]
        if not isinstance(encoder, LookupEncoder) or encoder.basis is not None:
            raise _no_start(
                "svd", "encoder=lookup with rank null", "encoder=lookup encoder.rank=null"
            )
        if head.weights != "raw":
            raise _no_start("svd", "raw weights", "model.head.weights=raw")
        n_users, rank = len(encoder.offsets.weight) - 1, head.basis.weight.shape[0]
        key, known = _key(model, pairs, n_users, rank, self.ridge), _FACTORS.setdefault(pairs, {})
        if key not in known:
            known[key] = self._factors(model, pairs, n_users=n_users, rank=rank)
        users, basis = known[key]
        _set(head.basis.weight, basis / head.scale)
        _set(encoder.generic_vector, users.mean(0))
        _set(encoder.offsets.weight[1:], users - users.mean(0))

    def _factors(
        self, model: PersonalRewardModel, pairs: PairDataset, *, n_users: int, rank: int
    ) -> Factors:
        """Compute users [n_users, rank] and directions [rank, d] from the train pairs."""
        differences = text_differences(model, pairs)
        ridge = self.ridge * float(differences.square().sum(1).mean())
        shared = are_judged_by_several_users(pairs)
        factorise = factors_of_judgments if shared else factors_of_coefficients
        return factorise(pairs, differences, n_users=n_users, rank=rank, ridge=ridge)


@check_arguments("model.start")
class HeadStart(Start):
    """Initialises the head with that of a published reward model.

    It becomes w of a linear or affine head. For a `BasisHead` it is added to all directions.

    Args:
        path: a safetensors file. key: name of the weights in it, [1, d] or [d].
    """

    reads_pairs = False

    def __init__(self, *, path: str, key: str = "score.weight") -> None:
        self.path, self.key = path, key

    def apply(self, model: PersonalRewardModel, data: PreferenceData, *, total_steps: int) -> None:
        if not Path(self.path).is_file():
            raise bad_value("model.start.path", self.path, "a safetensors file", "Give its path")
        content = load_file(self.path)
        if self.key not in content:
            cure = f"Set model.start.key to one of {', '.join(sorted(content))}"
            raise bad_value("model.start.key", self.key, "a tensor of the file", cure)
        direction = content[self.key].float().reshape(1, -1)
        head = model.head
        own = {LinearHead: "weight", AffineHead: "shared.weight", BasisHead: "basis.weight"}
        name = next((one for kind, one in own.items() if isinstance(head, kind)), None)
        if name is None:
            raise _no_start("head", "a head of directions", "model.head=linear")
        weight = head.get_parameter(name)
        if direction.shape[1] != weight.shape[1]:
            allowed = f"{weight.shape[1]} numbers, the width of the features"
            cure = "Give the head of the backbone that the model reads"
            raise bad_value("model.start.key", tuple(direction.shape), allowed, cure)
        _set(weight, weight.cpu() + direction if isinstance(head, BasisHead) else direction)


@check_arguments("model.start")
class SeveralStarts(Start):
    """Trains briefly from several random initialisations, and keeps the one with the lowest train loss.

    Mixtures get stuck if users who differ share a cluster; another initialisation avoids that.

    Args:
        n: number of initialisations. share: fraction of the training's steps that each of them is
            trained for.
    """

    def __init__(
        self,
        *,
        n: Annotated[int, Field(ge=2)] = 8,
        share: Annotated[Fraction, Field(gt=0)] = 0.1,
    ) -> None:
        self.n, self.share = n, share

    def apply(self, model: PersonalRewardModel, data: PreferenceData, *, total_steps: int) -> None:
        _check_pooled(model, data.datasets["train"])
        steps = max(1, math.ceil(self.share * total_steps))
        best, lowest = None, math.inf
        for number in range(self.n):
            with torch.random.fork_rng():
                torch.manual_seed(torch.initial_seed() + number)
                candidate = model if number == 0 else model.reinitialised()
                train_plainly(candidate, data, steps=steps, total_steps=total_steps)
            loss = train_loss(candidate, data.datasets["train"])
            if loss < lowest:
                best, lowest = _own_state(candidate), loss
        assert best is not None
        model.load_state_dict(best, strict=False)


STARTS: dict[str, type[Start]] = {
    "random": RandomStart,
    "pca": PcaStart,
    "svd": SvdStart,
    "mixed_logit": MixedLogitStart,
    "head": HeadStart,
    "several": SeveralStarts,
}


def build_start(start: str | Mapping[str, Any]) -> Start:
    """Build the `Start` of ``model.start``: a name of `STARTS`, or a mapping with it and settings."""
    settings = named_settings(start, STARTS, "model.start", "random")
    found: Start = build(settings, "model.start", kind=Start)
    return found


def train_plainly(
    model: PersonalRewardModel, data: PreferenceData, *, steps: int, total_steps: int
) -> None:
    """Train a model for the first `steps` of `total_steps`, without a Lightning trainer."""
    optimizer, schedule = model.optim.build(**model.trainable_parts(), total_steps=total_steps)
    device = next(model.parameters()).device
    model.train()
    model.reduction.count(data.datasets["train"].user_id)
    count_pairs(model, data)
    step = 0
    while step < steps:
        for batch in data.train_dataloader():
            weigh_priors(model, step)
            optimizer.zero_grad()
            model.training_loss(move_data_to_device(batch, device))[0].backward()
            model.reduction.step()
            optimizer.step()
            schedule.step()
            step += 1
            if step == steps:
                break
    optimizer.apply_delayed_decay()


@torch.no_grad()
def train_loss(model: PersonalRewardModel, pairs: PairDataset) -> float:
    """Compute the mean loss over train pairs."""
    device = next(model.parameters()).device
    model.eval()
    total = 0.0
    for start in range(0, len(pairs), 4096):
        batch = pairs.batch(range(start, min(start + 4096, len(pairs))))
        total += float(model.loss(move_data_to_device(batch, device))[0].double().sum())
    model.train()
    return total / len(pairs)


@torch.no_grad()
def text_differences(model: PersonalRewardModel, pairs: PairDataset) -> Tensor:
    """Return h_chosen - h_rejected of train pairs, as the head sees them, [N, d] float64.

    A layer in front of the head transforms the texts with its initial weights.
    """
    _check_pooled(model, pairs)
    assert pairs.hidden is not None
    was_training = model.training
    model.eval()  # without dropout
    texts = model.aggregator.transform_texts(pairs.hidden.values.to(model.device))
    model.train(was_training)
    assert texts is not None
    values = texts[:, : model.aggregator.output_size].double().cpu()  # prompts behind them if read
    chosen, rejected = pairs.hidden.of_pair.T
    return values[chosen] - values[rejected]


def _basis_head(model: PersonalRewardModel) -> BasisHead:
    """Return the model's `BasisHead`; raise a ValueError if it has another head."""
    if not isinstance(model.head, BasisHead) or model.aggregator.user_acts:
        raise _no_start("pca or svd", "a basis head alone", "model.head=basis aggregator=none")
    return model.head


def _key(model: PersonalRewardModel, pairs: PairDataset, *settings: float) -> tuple[Any, ...]:
    """Return a key of what is computed from the features of train pairs behind the model's layer."""
    layer = [float(one.detach().sum()) for one in model.aggregator.text_parameters()]
    return (id(pairs.hidden), *settings, *layer)


def _check_pooled(model: PersonalRewardModel, pairs: PairDataset) -> None:
    """Raise a ValueError unless the trunk is frozen and its pooled outputs are known."""
    if not model.needs_only_pooled or pairs.hidden is None:
        raise _no_start(
            "other than random",
            "a frozen trunk that no user acts in",
            "backbone.trainable=frozen aggregator=none",
        )


def _no_start(name: str, needed: str, cure: str) -> BadValue:
    """Return the error for a model that `model.start` cannot initialise."""
    return bad_value("model.start", name, f"random, or a model with {needed}", f"Set {cure}")


def _own_state(model: PersonalRewardModel) -> dict[str, Tensor]:
    """Return a copy of all weights but the backbone's."""
    state = model.state_dict().items()
    return {name: value.clone() for name, value in state if not name.startswith("backbone.")}


@torch.no_grad()
def _set(parameter: Tensor, value: Tensor) -> None:
    """Copy a value into a parameter in place."""
    parameter.copy_(value)
