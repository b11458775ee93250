"""What every dataset gives: records to be checked, and where known the true margins."""

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
    """Where rows come from; one subclass a dataset, and checking is left to `reading.read_rows`."""

    @abstractmethod
    def records(self) -> Iterator[tuple[str, Mapping[str, Any] | Refusal]]:
        """Yield each record with its place (``pairs.jsonl:17``), or why it could not be read."""

    def oracle_margins(self) -> dict[str, float] | None:
        """Return ``pair_id`` -> true margin (log odds) of chosen over rejected for its user.

        Only a synthetic world knows them; None for human data.
        """
        return None

    def world(self) -> str | None:
        """Return what tells this source's people from people of the same ids elsewhere.

        None for real people, of whom an id is the same person in every run.
        """
        return None

    def true_score(self, user_id: str, text: str) -> float | None:
        """Return how much this user likes a text, in log odds; None where nobody knows."""
        return None

    def profile(self, user_id: str) -> str | None:
        """Return what a person may read about this user, or None."""
        return None

    def group(self, user_id: str) -> str | None:
        """Return the kind of user this one is known to be, by which a map is coloured, or None."""
        return None


def id_as_text(value: object) -> object:
    """Return whole numbers as text and anything else as it is: tables often number their users.

    A column with gaps turns integers into floats, so that ``1``, ``1.0`` and the text ``"1.0"``
    are one id. A float from 2**53 on stands for several whole numbers and is left to be refused.
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
    """Yield the records, refusing those whose prompt a later split has too: test keeps all of its
    own, then val, so that no ``prompt_id`` is in two splits."""
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
