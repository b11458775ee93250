"""The interface of data sets: unchecked records and, if known, true preferences."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from plrhf.data.reasons import Reason, Refusal, refusal
from plrhf.data.rows import SPLITS

_WHOLE = re.compile(r"(0|-?[1-9]\d*)\.0+")


class Source(ABC):
    """A dataset. It yields unchecked records, which `reading.read_rows` checks.

    Attributes:
        form: name of the form that records were converted from; None: they were rows.
    """

    form: str | None = None

    @abstractmethod
    def records(self) -> Iterator[tuple[str, Mapping[str, Any] | Refusal]]:
        """Yield each record with its place (``pairs.jsonl:17``), or the reason why it is refused."""

    def oracle_margins(self) -> dict[str, float] | None:
        """Return the true margin (log odds) of chosen over rejected by pair id; None if unknown.

        Only synthetic data have true margins.
        """
        return None

    def world(self) -> str | None:
        """Return a name of the synthetic world, in which a user id stands for its own person.

        None for real data, where a user id is the same person in every run.
        """
        return None

    def true_score(self, user_id: str, text: str) -> float | None:
        """Return how much this user likes a text, in log odds; None if unknown."""
        return None

    def measured_style(self, text: str) -> dict[str, float] | None:
        """Return a text's attributes by name, in standard deviations; None if the source measures none."""
        return None

    def taste(self, user_id: str) -> dict[str, float] | None:
        """Return how much this user likes each attribute of `measured_style`; None if unknown."""
        return None

    def profile(self, user_id: str) -> str | None:
        """Return a description of this user for people to read, or None."""
        return None

    def group(self, user_id: str) -> str | None:
        """Return the name of this user's group, for the colours of maps, or None."""
        return None


def id_as_text(value: object) -> object:
    """Turn an id that is a whole number into text, and return any other value as it is.

    ``1``, ``1.0`` and the text ``"1.0"`` are the same id, because a table column with gaps turns
    integers into floats. A float from 2**53 on may stand for several integers, so `parse_row`
    refuses it.
    """
    if isinstance(value, str):
        return value.partition(".")[0] if _WHOLE.fullmatch(value) else value
    if isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return str(int(value))
    return str(value) if isinstance(value, int) else value


def refuse_shared_prompts(
    records: Iterable[tuple[str, Mapping[str, Any] | Refusal]],
) -> Iterator[tuple[str, Mapping[str, Any] | Refusal]]:
    """Refuse records whose prompt is also in a later split, and yield all others.

    Afterwards no ``prompt_id`` is in two splits. Test keeps all of its records.
    """
    kept = list(records)
    last: dict[str, int] = {}  # prompt_id -> place of the last split it is in
    for _, record in kept:
        if not isinstance(record, Refusal):
            place = SPLITS.index(record["split"])
            last[record["prompt_id"]] = max(place, last.get(record["prompt_id"], 0))
    for where, record in kept:
        if isinstance(record, Refusal) or record["split"] == SPLITS[last[record["prompt_id"]]]:
            yield where, record
        else:
            allowed = f"a prompt that {SPLITS[last[record['prompt_id']]]} does not have"
            cure = "Set data.protocol=paper to keep it"
            reason = Reason.PROMPT_IN_TWO_SPLITS
            yield where, refusal(reason, "split", record["split"], allowed, cure)
