"""Scores and generates texts for given users with a trained model.

    import plrhf

    asked = [
        {"user_id": "ada", "prompt": "Write a note.", "response": "Back at six."},
        {"prompt": "Write a note.", "response": "Back at six."},  # nobody in particular
    ]
    rewards = plrhf.load("REWARD_DIR/export").score(asked)
    texts = plrhf.load("POLICY_DIR/export").write(asked, max_new_tokens=64)

Requests are in the row format, with a `response` in the place of the two responses of a pair. A request
without `user_id` is for the generic user. It may have `user_features`, for encoders that read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from torch import Tensor

from plrhf.core.errors import bad_value
from plrhf.core.types import GENERIC_USER, PreferenceBatch, UserBatch
from plrhf.data.dataset import PairDataset
from plrhf.data.parsing import parse_row
from plrhf.data.rows import Row
from plrhf.models.card import Card
from plrhf.models.generation import generate
from plrhf.models.hub import export_of
from plrhf.models.loading import load_export
from plrhf.models.pair_batches import (
    batches_of,
    compute_per_pair,
    dataset_of,
    row_tokenizer_of,
)

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule
    from plrhf.models.policy import PersonalPolicy
    from plrhf.models.reward import PersonalRewardModel

Asked = Sequence[Mapping[str, Any]]


def load(directory: str | Path, **options: Any) -> PersonalModule:
    """Load the exported model of a run with its tokenizer, in eval mode.

    Args:
        directory: an export, the run's directory, or ``hf://ORG/NAME`` of the hub.
        options: of `loading.load_export`, e.g. ``backbone_path`` if the frozen backbone has moved.

    Raises:
        ValueError: there is no complete export, or the backbone has other weights.
    """
    model: Any = load_export(LightningModule, export_of(directory), **options)
    return model


@torch.no_grad()
def score(model: PersonalRewardModel, asked: Asked, *, batch_size: int = 32) -> Tensor:
    """Compute the rewards of N responses, each for its user, [N] float32.

    Only rewards for the same prompt and user can be compared.

    Args:
        model: from an export. asked: requests with prompt, response and user, see above.

    Raises:
        ValueError: a response or prompt that cannot be read or is too long, or an unknown user.
    """
    rows, dataset = _texts_to_score(model, asked, batch_size=batch_size)
    users = _user_ids(model.card, rows)
    return _rewards(
        model, dataset, users, lambda batch: model.rewards(batch)[:, 0], batch_size=batch_size
    )


@torch.no_grad()
def score_for(
    model: PersonalRewardModel, asked: Asked, vectors: Tensor, *, batch_size: int = 32
) -> Tensor:
    """Compute the rewards of N responses for given user vectors [N, user_dim], [N] float32.

    Args:
        model: from an export. asked: requests with prompt and response.

    Raises:
        ValueError: a response or prompt that cannot be read or is too long.
    """
    rows, dataset = _texts_to_score(model, asked, batch_size=batch_size)
    vectors = vectors.to(model.device)

    def rewards(batch: PreferenceBatch) -> Tensor:
        return model.margins_for(batch, vectors[batch.user_id])[1][0, :, 0]

    return _rewards(model, dataset, list(range(len(rows))), rewards, batch_size=batch_size)


def _texts_to_score(
    model: PersonalRewardModel, asked: Asked, *, batch_size: int
) -> tuple[list[Row], PairDataset]:
    """Return requests as rows and as tokenised pairs, in which the second response is empty."""
    row_tokenizer = row_tokenizer_of(model)
    rows = [
        replace(row, chosen=_response(one, place), rejected="")
        for place, (one, row) in enumerate(zip(asked, _checked_rows(asked), strict=True))
    ]
    with model.autocast():
        dataset = dataset_of(model, row_tokenizer, rows, batch_size=batch_size)
    if len(dataset) < len(rows):
        raise bad_value(
            "asked",
            f"{len(rows) - len(dataset)} too long",
            f"prompt and response of at most {row_tokenizer.max_tokens} tokens",
            "Leave out what is longer, or train with a larger data.max_tokens",
        )
    return rows, dataset


def _rewards(
    model: PersonalRewardModel,
    dataset: PairDataset,
    owners: Sequence[int],
    rewards: Callable[[PreferenceBatch], Tensor],
    *,
    batch_size: int,
) -> Tensor:
    """Compute the rewards [N] of the first responses of all pairs, each for its owner."""
    if len(dataset) == 0:
        return torch.empty(0)
    batches = batches_of(dataset, range(len(dataset)), owners, batch_size=batch_size)
    with model.autocast():
        return compute_per_pair(rewards, batches, model.device)


def write(model: PersonalPolicy, asked: Asked, **how: Any) -> list[str]:
    """Generate N texts, each for its user, many users in one batch.

    Args:
        model: from an export. asked: requests with prompt and user, see above.
        how: `max_new_tokens`, `temperature`, `top_p`, `batch_size`, `seed` of `generate`.

    Raises:
        ValueError: a prompt that cannot be read, no room for the new tokens, or an unknown user.
    """
    rows = _checked_rows(asked)
    row_tokenizer = row_tokenizer_of(model)
    users = UserBatch(
        user_id=torch.tensor(_user_ids(model.card, rows), dtype=torch.int64),
        features=model.card.feature_schema().table([row.user_features for row in rows]),
    )
    return generate(
        model, model.tokenizer, [row_tokenizer.prompt(row) for row in rows], users, **how
    )


def _checked_rows(asked: Asked) -> list[Row]:
    """Check requests as rows of training are checked. The rows get placeholder responses.

    The user id of a request for the generic user is blank, which no user's is.
    """
    rows = []
    for place, one in enumerate(asked):
        is_named = one.get("user_id") is not None
        user = {"user_id": one["user_id"] if is_named else "nobody"}
        row = parse_row({**one, **user, "chosen": "A", "rejected": "B"}, f"asked[{place}]")
        rows.append(row if is_named else replace(row, user_id=""))
    return rows


def _response(one: Mapping[str, Any], place: int) -> str:
    """Return a request's response; raise a ValueError if it is not text."""
    response = one.get("response")
    if not isinstance(response, str) or not response.strip():
        raise bad_value(
            f"asked[{place}].response",
            response,
            "text that is not blank",
            "Give the text to be scored",
        )
    return response


def _user_ids(card: Card, rows: Sequence[Row]) -> list[int]:
    """Return the user index of each request, the generic user's for a blank id."""
    named = [row.user_id for row in rows]
    index = {user: card.user_index(user) if user else GENERIC_USER for user in set(named)}
    return [index[user] for user in named]
