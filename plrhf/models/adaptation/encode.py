"""Computes a new user's vector with an encoder that reads pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch, UserBatch
from plrhf.models.adaptation.base import Adaptation, AdaptedUsers
from plrhf.models.context import context_of_batches

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule


def reads_own_text(model: PersonalModule) -> bool:
    """Return whether pairs of the user are put in front of the model's prompts as text."""
    card = getattr(model, "card", None)  # a model that was put together by hand has none
    return card is not None and "context_pairs" in card.text


def reads_pairs(model: PersonalModule) -> bool:
    """Return whether a new user of the model needs no fitting, as it reads the user's pairs."""
    return model.encoder.reads_context or (reads_own_text(model) and not model.encoder.personal)


class Encode(Adaptation):
    """Runs the model's encoder on the new user's pairs, as on those of train users; nothing is fitted.

    If the model reads the pairs in front of prompts instead (`data.context_pairs`), the user's vector is
    the generic one.
    """

    def fit(
        self,
        model: PersonalModule,
        batches: Sequence[PreferenceBatch],
        *,
        n_users: int,
        features: Tensor | None = None,
    ) -> AdaptedUsers:
        encoder = model.encoder
        if not reads_pairs(model):
            raise bad_value(
                "eval.adaptation",
                "encode",
                f"a rule that fits, as {type(encoder).__name__} reads no pairs",
                "Set eval/adaptation=posterior, or train with encoder=odd or data.context_pairs=4",
            )
        with torch.no_grad():
            if not encoder.reads_context:
                return AdaptedUsers(vectors=encoder.generic(n_users).to(model.device), rows={})
            if len(batches) == 0:
                return AdaptedUsers(vectors=encoder.generic(n_users).clone())
            context = context_of_batches(model, batches, n_users=n_users)
            nobody = torch.zeros(n_users, dtype=torch.int64, device=context.texts.device)
            unknown = batches[0].features.new_full(
                (n_users, batches[0].features.shape[1]), torch.nan
            )
            users = UserBatch(nobody, unknown.to(nobody.device), context)
            return AdaptedUsers(vectors=encoder(users))
