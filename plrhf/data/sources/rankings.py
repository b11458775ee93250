"""Rows from rankings: of any two responses that a user ranked, the better one is chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from plrhf.data.digests import content_hash
from plrhf.data.reasons import Reason, Refusal, refusal
from plrhf.data.sources.base import id_as_text
from plrhf.data.sources.comparisons import PROMPT_COLUMNS, USER_COLUMNS, first_of
from plrhf.data.sources.formats import Record

RANKING, RESPONSES, RANKS = "ranking", "responses", "ranks"
MOST_RANKED = 16
"""Largest number of responses in a ranking, which gives 120 pairs."""


def is_ranking(names: Collection[str]) -> bool:
    """Whether there is a list of responses, the best first, or responses with their ranks."""
    return RANKING in names or {RESPONSES, RANKS} <= set(names)


def rows(records: Iterator[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    """Turn each ranking into the pairs that follow from it, which share a ``group_id``.

    A ranking is refused as a whole if it has a text twice, a rank twice, or fewer than two responses.
    """
    for number, record in records:
        if isinstance(record, Refusal):
            yield number, record
            continue
        ranked = _ranked(record)
        if isinstance(ranked, Refusal):
            yield number, ranked
            continue
        row = row_of_group(record, ranked, number, used=(RANKING, RESPONSES, RANKS))
        for chosen, rejected in combinations(ranked, 2):
            yield number, {**row, "chosen": chosen, "rejected": rejected}


def row_of_group(
    record: Mapping[str, Any], texts: Sequence[str], number: int, *, used: Collection[str | None]
) -> dict[str, Any]:
    """Return what all pairs from one record share: user, prompt, ``group_id`` and other fields.

    Args:
        texts: that the record compares. number: its place in the file.
        used: columns that say which texts are preferred.
    """
    user, prompt = (first_of(one, list(record)) for one in (USER_COLUMNS, PROMPT_COLUMNS))
    read = {*used, user, prompt}
    row = {name: value for name, value in record.items() if name not in read}
    if user is not None:
        row["user_id"] = id_as_text(record[user])
    if prompt is not None:
        row["prompt"] = record[prompt]
    own = row.pop("pair_id", None)
    row["group_id"] = f"{content_hash(list(texts))}-{number}" if own is None else str(own)
    return row


def _ranked(record: Mapping[str, Any]) -> list[str] | Refusal:
    """Return the responses of a ranking, the best first, or why it is refused."""
    field: str = RANKING
    texts: Any = record.get(RANKING)
    if texts is None:
        ranks: Any = record.get(RANKS)
        field, texts = RESPONSES, record.get(RESPONSES)
        if not _is_list(ranks) or not _is_list(texts) or len(ranks) != len(texts):
            allowed, cure = "a rank for each response", "Give two lists of one length"
            return refusal(Reason.BAD_RANKING, RANKS, ranks, allowed, cure)
        if not all(_is_number(one) for one in ranks):
            allowed, cure = "numbers, 1 for the best", "Write ranks as numbers"
            return refusal(Reason.BAD_RANKING, RANKS, ranks, allowed, cure)
        if len(set(ranks)) < len(ranks):
            allowed, cure = "a different rank for each response", "Leave out what is level"
            return refusal(Reason.BAD_RANKING, RANKS, ranks, allowed, cure)
        texts = [text for _, text in sorted(zip(ranks, texts, strict=True), key=lambda one: one[0])]
    if not _is_list(texts) or not all(isinstance(one, str) and one.strip() for one in texts):
        allowed, cure = "a list of texts that are not blank", "Write the best response first"
        return refusal(Reason.BAD_RANKING, field, texts, allowed, cure)
    if not 2 <= len(texts) <= MOST_RANKED:
        shown, allowed = f"{len(texts)} responses", f"2 to {MOST_RANKED} responses"
        return refusal(Reason.BAD_RANKING, field, shown, allowed, "Shorten it, or leave it out")
    if len({text.strip() for text in texts}) < len(texts):
        allowed, cure = "each response once", "Leave out what is repeated"
        return refusal(Reason.BAD_RANKING, field, list(texts), allowed, cure)
    return list(texts)


def _is_number(value: object) -> bool:
    """Whether a value is a number that can be ordered, unlike NaN."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and value == value


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))
