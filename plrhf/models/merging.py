"""Turns a policy and one user into a plain Hugging Face model, which needs no plrhf to write for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plrhf.aggregators import ConcatSoftPrompt, FiLM
from plrhf.backbone.merging import (
    add_prompt_tokens,
    fold_into_norm,
    probe_states,
    put_in_front,
    start_token,
)
from plrhf.core.errors import bad_value
from plrhf.core.types import GENERIC_USER, UserBatch
from plrhf.data.parsing import parse_row

if TYPE_CHECKING:
    from plrhf.models.policy import PersonalPolicy


def save_merged(
    model: PersonalPolicy,
    directory: Path,
    *,
    user: str | None,
    features: Mapping[str, float | str] | None = None,
) -> None:
    """Write a plain model and tokenizer that write as the policy does for one user.

    LoRA is merged into the weights. FiLM at the last hidden states becomes part of the last
    normalisation. A soft prompt in front becomes new tokens of the vocabulary, which the tokenizer (and
    its chat template) puts in front of every text and which are never written. The policy itself is
    changed by this and must not be used afterwards.

    Args:
        model: from an export. user: a known user id; None: the generic user.
        features: of the user, for encoders that read them.

    Raises:
        ValueError: an unknown user, or an aggregator that no plain model can hold.
    """
    aggregator, backbone = model.aggregator, model.backbone
    vector = user_vector(model, user, features)
    tokenizer = copy.deepcopy(model.tokenizer)
    names = start_token(tokenizer)
    before = probe_states(backbone)
    plain = backbone.merged()
    if len(vector) == 0:
        pass  # no user model
    elif isinstance(aggregator, FiLM) and aggregator.after_trunk:
        fold_into_norm(backbone, *_scale_and_shift(aggregator, vector), before)
    elif isinstance(aggregator, ConcatSoftPrompt) and not aggregator.after_prompt:
        vectors = vector.view(-1, aggregator.embedding_size)
        names = [*add_prompt_tokens(backbone, plain, tokenizer, vectors), *names]
    else:
        raise bad_value(
            "aggregator",
            model.card.aggregator.get("name", type(aggregator).__name__),
            "film with aggregator.site=last, or soft_prompt with aggregator.position=before, as no "
            "plain model acts otherwise for one user",
            "Train such a policy, or use the export with plrhf",
        )
    put_in_front(tokenizer, names)
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def user_vector(
    model: PersonalPolicy, user: str | None, features: Mapping[str, float | str] | None
) -> Tensor:
    """Compute the vector [D] of a user."""
    index = GENERIC_USER if user is None else model.card.user_index(user)
    asked = {"prompt": "A", "chosen": "B", "rejected": "C", "user_id": user or "nobody"}
    row = parse_row({**asked, "user_features": features}, "user")
    users = UserBatch(
        user_id=torch.tensor([index]),
        features=model.card.feature_schema().table([row.user_features]),
    )
    with torch.no_grad():
        return model.encode(users)[0][0].float()


def _scale_and_shift(aggregator: FiLM, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale 1 + gamma and the shift beta of a user's vector, [d] each."""
    with torch.no_grad():
        film = aggregator.film(vector)[0]  # [1 or 2, d]
    shift = film[1] if len(film) > 1 else torch.zeros_like(film[0])
    return 1 + film[0], shift
