"""One new user from pairs as a person would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from plrhf.core.errors import bad_value
from plrhf.data.parsing import parse_row
from plrhf.data.tokenizer import RowTokenizer
from plrhf.models.adaptation.base import Adaptation
from plrhf.models.adaptation.encode import Encode
from plrhf.models.adaptation.posterior import Posterior
from plrhf.models.pair_batches import batches_of, dataset_of

if TYPE_CHECKING:
    from plrhf.models.base import PersonalModule

BATCH_SIZE = 32


@dataclass(frozen=True)
class NewUser:
    """A user fitted to a model that has not met them.

    Attributes:
        vector: e_u, [user_dim], on the CPU.
        rows: their own parameters by name, on the CPU, a row each of the encoder's tables; None where the
            rule gives a vector alone. See `enrol`.
        n_pairs: pairs the user was fitted to. n_too_long: pairs left out as too long for the model.
    """

    vector: Tensor
    rows: dict[str, Tensor] | None = None
    n_pairs: int = 0
    n_too_long: int = 0


def adapt(
    model: PersonalModule, pairs: Sequence[Mapping[str, Any]], rule: Adaptation | None = None
) -> NewUser:
    """Fit a new user to a few of their pairs; all else of the model is frozen and stays as it is.

    Args:
        model: loaded from an export, so that it has a tokenizer.
        pairs: rows of one user in the row format; `user_id` may be missing. No pairs at all give what the
            rule knows of nobody, as a rule the generic user.
        rule: how the user is found; None: `Encode` where the encoder reads pairs, else `Posterior`.

    Raises:
        ValueError: a pair that cannot be used, no pair that is short enough, or a model that the rule
            cannot adapt.
    """
    if rule is None:
        rule = Encode() if model.encoder.reads_context else Posterior()
    row_tokenizer = RowTokenizer(model.tokenizer, **model.card.text)
    rows = [
        parse_row({"user_id": "new", **pair}, f"pair {number}")
        for number, pair in enumerate(pairs, 1)
    ]
    was_training = model.training
    model.eval()
    with model.autocast():
        dataset = dataset_of(model, row_tokenizer, rows, batch_size=BATCH_SIZE)
        if len(dataset) == 0 and len(rows) > 0:
            raise bad_value(
                "pairs",
                f"{len(rows)} too long",
                f"prompt and response of at most {row_tokenizer.max_tokens} tokens",
                "Give shorter pairs, or train with a larger data.max_tokens",
            )
        owners = [0] * len(dataset)
        batches = batches_of(dataset, range(len(dataset)), owners, batch_size=BATCH_SIZE)
        found = rule.fit(model, batches, n_users=1)
    model.train(was_training)
    rows_of_user = found.rows
    return NewUser(
        vector=found.vectors[0].cpu(),
        rows=None if rows_of_user is None else {k: v[0].cpu() for k, v in rows_of_user.items()},
        n_pairs=len(dataset),
        n_too_long=len(rows) - len(dataset),
    )
