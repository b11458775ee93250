"""Prepares the pairs of users that some encoders read (`UserEncoder.reads_context`)."""

from __future__ import annotations

from collections.abc import Sequence
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
from plrhf.encoders import PairReader, UserEncoder

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule


def check_context(encoder: UserEncoder, backbone: Backbone) -> None:
    """Raise a ValueError if an encoder reads pairs by the trunk, but training would change the trunk."""
    if encoder.reads_context and backbone.trainable == "full":
        raise bad_value(
            "backbone.trainable",
            "full",
            "lora or frozen with an encoder that reads pairs, as it sees them by the trunk that "
            "training began with",
            "Set backbone.trainable=lora, or encoder=lookup",
        )


def context_features(model: PersonalModule, batch: PreferenceBatch) -> Tensor:
    """Pool the outputs of the untrained trunk, [B, 2, d] float32, without gradient.

    Encoders that read pairs get their texts in this form.
    """
    with model.backbone.reference():
        hidden = model.backbone.read_text(batch)[None]
    return pool_responses(hidden, batch.segment, n_pairs=len(batch), pooling=model.pooling)[
        0
    ].float()


def reusable_context_features(model: PersonalModule, dataset: PairDataset) -> TextValues | None:
    """Return the `context_features` of a dataset if its pooled trunk outputs are the same; else None."""
    if dataset.hidden is None or not model.needs_only_pooled:
        return None
    # Behind them may stand those of prompts.
    return TextValues(
        dataset.hidden.values[:, : model.backbone.hidden_size], dataset.hidden.of_pair
    )


@torch.no_grad()
def context_of_batches(
    model: PersonalModule, batches: Sequence[PreferenceBatch], *, n_users: int
) -> UserContext:
    """Collect all pairs of N new users into a `UserContext`; `user_id` in the batches is from 0 to N - 1.

    Args:
        batches: from `pair_batches.dataset_of`, at least one.
    """
    features, owners = [], []
    for batch in batches:
        batch = move_data_to_device(batch, model.device)
        if batch.hidden is None:
            features.append(context_features(model, batch))
        else:  # of the frozen trunk; behind them may stand those of prompts
            assert batch.texts is not None
            features.append(batch.hidden[batch.texts][..., : model.backbone.hidden_size])
        owners.append(batch.user_id)
    hidden, owner = torch.cat(features), torch.cat(owners)  # [P, 2, d], [P]
    counts = owner.bincount(minlength=n_users)
    present = torch.arange(int(counts.max()), device=owner.device) < counts[:, None]  # [N, k]
    pairs = torch.zeros_like(present, dtype=torch.int64)
    pairs[present] = owner.argsort(stable=True)
    texts = 2 * pairs[..., None] + torch.arange(2, device=owner.device)
    return UserContext(hidden=hidden.flatten(0, 1), texts=texts, present=present)


def store_vectors(model: PersonalModule, data: PreferenceData) -> None:
    """Store the vectors of all train users in an encoder that reads pairs, so that the export has them."""
    draw = data.datasets["train"].context
    if draw is None or not isinstance(model.encoder, PairReader):
        return
    model.eval()
    for users in draw.train_users(data.eval_batch_size):
        model.encoder.store(move_data_to_device(users, model.device))
