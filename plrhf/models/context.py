"""Pairs of users as the input of encoders that read them, for a model and its texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from plrhf.backbone.model import Backbone
from plrhf.core.errors import bad_value
from plrhf.core.pooling import pool_responses
from plrhf.core.types import PreferenceBatch, UserContext
from plrhf.data.dataset import PairDataset, TextValues
from plrhf.data.module import PreferenceData
from plrhf.data.own_pairs import context_of
from plrhf.encoders import PairReader, UserEncoder
from plrhf.models.pair_batches import text_values

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule


def check_context(encoder: UserEncoder, backbone: Backbone) -> None:
    """Raise where an encoder reads pairs by a trunk that will no longer be what it was."""
    if encoder.reads_context and backbone.trainable == "full":
        raise bad_value(
            "backbone.trainable",
            "full",
            "lora or frozen with an encoder that reads pairs, as it sees them by the trunk that "
            "training began with",
            "Set backbone.trainable=lora, or encoder=lookup",
        )


def context_features(model: PersonalModule, batch: PreferenceBatch) -> Tensor:
    """Pool the outputs of the trunk as it was before training, [B, 2, d] float32, no gradient.

    This is how encoders that read pairs of users see their texts.
    """
    with model.backbone.reference():
        hidden = model.backbone.read_text(batch)[None]
    return pool_responses(hidden, batch.segment, n_pairs=len(batch), pooling=model.pooling)[
        0
    ].float()


def known_context(model: PersonalModule, dataset: PairDataset) -> TextValues | None:
    """Return the `context_features` of a dataset where they are those of its frozen trunk."""
    if dataset.hidden is None or not model.pooled_suffices:
        return None
    # Behind them may stand those of prompts.
    return TextValues(
        dataset.hidden.values[:, : model.backbone.hidden_size], dataset.hidden.of_pair
    )


def context_of_users(
    model: PersonalModule,
    dataset: PairDataset,
    given: Sequence[Sequence[int]],
    *,
    batch_size: int,
) -> UserContext | None:
    """Make the context of B users, for an encoder that reads pairs, on the CPU; None without any pair.

    Args:
        dataset: of `dataset_of`. given: the places in it of each user's pairs, [B][k_u].
    """
    if dataset.context_hidden is None:
        dataset.context_hidden = known_context(model, dataset)
    if dataset.context_hidden is None:
        features = partial(context_features, model)
        dataset.context_hidden = text_values(model, dataset, features, batch_size)
    if dataset.context_hidden is None:
        return None
    most = max((len(places) for places in given), default=0)
    filled = [[*places, *[0] * (most - len(places))] for places in given]
    present = [[at < len(places) for at in range(most)] for places in given]
    places = torch.tensor(filled, dtype=torch.int64).view(len(given), most)
    return context_of(
        dataset.context_hidden, places, torch.tensor(present).view(len(given), most).bool()
    )


def store_vectors(model: PersonalModule, data: PreferenceData) -> None:
    """Let an encoder that reads pairs keep the vectors of all train users, which the export holds."""
    draw = data.datasets["train"].context
    if draw is None or not isinstance(model.encoder, PairReader):
        return
    model.eval()
    for users in draw.train_users(data.eval_batch_size):
        model.encoder.store(move_data_to_device(users, model.device))
