"""Train users whose rows of the encoder's tables follow from their pairs, not from the optimiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities import move_data_to_device

from plrhf.data.dataset import PairDataset
from plrhf.encoders import EnsembleEncoder
from plrhf.models.adaptation.reweight import Reweight
from plrhf.models.inner import fit_train_users
from plrhf.models.pair_batches import POOLED_AT_ONCE

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule

SMALLEST_WEIGHT = 1e-12
"""Smallest weight of a member of an ensemble, so that its logarithm is finite."""


def has_found_users(model: PersonalModule) -> bool:
    """Return whether `find_train_users` changes the model."""
    return model.inner is not None or isinstance(model.encoder, EnsembleEncoder)


def find_train_users(model: PersonalModule, dataset: PairDataset) -> None:
    """Set the rows of all train users from all of their train pairs, as the model finds users."""
    if model.inner is not None:
        fit_train_users(model, dataset, model.inner)
    elif isinstance(model.encoder, EnsembleEncoder):
        weigh_members(model, model.encoder, dataset)


@torch.no_grad()
def weigh_members(model: PersonalModule, encoder: EnsembleEncoder, dataset: PairDataset) -> None:
    """Weigh an ensemble's members for each train user by the likelihood of the user's train pairs."""
    was_training = model.training
    model.eval()
    size = POOLED_AT_ONCE if dataset.hidden is not None else 32
    batches = [
        move_data_to_device(dataset.batch(range(at, min(at + size, len(dataset)))), model.device)
        for at in range(0, len(dataset), size)
    ]
    table = encoder.weights.weight
    found = Reweight(of="clusters").fit(model, batches, n_users=len(table))
    table.copy_(found.vectors.clamp(min=SMALLEST_WEIGHT).log())
    model.train(was_training)
