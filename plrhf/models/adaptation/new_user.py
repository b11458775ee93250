"""Adapts a model to one new user, from rows in the format that people write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plrhf.core.errors import bad_value
from plrhf.data.dataset import PairDataset
from plrhf.data.in_context import row_tokenizer
from plrhf.data.parsing import parse_row
from plrhf.data.rows import Row
from plrhf.models.adaptation.base import Adaptation, AdaptedUsers
from plrhf.models.adaptation.encode import Encode, reads_own_text, reads_pairs
from plrhf.models.adaptation.posterior import Posterior
from plrhf.models.pair_batches import batches_of, dataset_of

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule

BATCH_SIZE = 32


@dataclass(frozen=True)
class NewUser:
    """A user that was fitted to a trained model.

    Attributes:
        vector: e_u, [user_dim], on the CPU.
        rows: the user's row of each of the encoder's tables by name, on the CPU; None: the rule gives a
            vector only. See `enrol`.
        pairs: what is put in front of the user's prompts, if the model reads that.
        n_pairs: number of pairs used. n_too_long: number of pairs left out because the model cannot
            read texts of that length.
    """

    vector: Tensor
    rows: dict[str, Tensor] | None = None
    pairs: tuple[Row, ...] = ()
    n_pairs: int = 0
    n_too_long: int = 0


@dataclass(frozen=True)
class FittedPairs:
    """One new user as a rule fitted them, and how many of their pairs were used.

    Attributes:
        users: N = 1, on the model's device. pairs: those used. n_too_long: see `NewUser`.
    """

    users: AdaptedUsers
    pairs: tuple[Row, ...]
    n_too_long: int

    @property
    def n_pairs(self) -> int:
        """Number of pairs used."""
        return len(self.pairs)


def adapt(
    model: PersonalModule,
    pairs: Sequence[Mapping[str, Any]],
    rule: Adaptation | None = None,
    *,
    user_features: Mapping[str, Any] | None = None,
) -> NewUser:
    """Fit a new user to a few of their pairs; all other parameters of the model stay as they are.

    Args:
        model: loaded from an export, so that it has a tokenizer.
        pairs: rows of one user in the row format; `user_id` may be missing. Without any pairs the
            result is what the rule gives an unknown user, usually the generic user.
        rule: None: `Encode` if the model reads pairs instead of being fitted, else `Posterior`.
        user_features: what is known of the user; None: what the pairs say.

    Raises:
        ValueError: a pair that cannot be used, only pairs that are too long, or a model that the rule
            cannot adapt.
    """
    if rule is None:
        rule = Encode() if reads_pairs(model) else Posterior()
    found = fit_pairs(model, pairs, rule, user_features=user_features)
    if found.n_pairs == 0 and len(pairs) > 0:
        raise bad_value(
            "pairs",
            f"{len(pairs)} too long",
            f"prompt and response of at most {model.card.text['max_tokens']} tokens",
            "Give shorter pairs, or train with a larger data.max_tokens",
        )
    rows = found.users.rows
    return NewUser(
        vector=found.users.vectors[0].cpu(),
        rows=None if rows is None else {k: v[0].cpu() for k, v in rows.items()},
        pairs=found.pairs if reads_own_text(model) else (),
        n_pairs=found.n_pairs,
        n_too_long=found.n_too_long,
    )


def fit_pairs(
    model: PersonalModule,
    pairs: Sequence[Mapping[str, Any]],
    rule: Adaptation,
    *,
    known: PairDataset | None = None,
    user_features: Mapping[str, Any] | None = None,
) -> FittedPairs:
    """Fit a new user as `adapt` does, and return all that the rule found.

    If all pairs are too long, the user is as one without pairs.

    Args:
        user_features: see `adapt`. known: texts that were computed before, see `dataset_of`.
    """
    tokenizer = row_tokenizer(model.tokenizer, model.card.text)
    rows = [
        parse_row({"user_id": "new", **pair}, f"pair {number}")
        for number, pair in enumerate(pairs, 1)
    ]
    schema = model.card.feature_schema()
    features = None if user_features is None else torch.tensor([schema.encode_raw(user_features)])
    was_training = model.training
    model.eval()
    with model.autocast():
        dataset = dataset_of(model, tokenizer, rows, batch_size=BATCH_SIZE, known=known)
        owners = [0] * len(dataset)
        batches = batches_of(dataset, range(len(dataset)), owners, batch_size=BATCH_SIZE)
        users = rule.fit(model, batches, n_users=1, features=features)
    model.train(was_training)
    return FittedPairs(users, tuple(dataset.rows), n_too_long=len(rows) - len(dataset))
