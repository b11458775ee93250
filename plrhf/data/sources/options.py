"""Rows from survey questions: the option that a person chose is preferred to all others."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from plrhf.data.reasons import Reason, Refusal, refusal
from plrhf.data.sources.comparisons import first_of
from plrhf.data.sources.formats import Record
from plrhf.data.sources.rankings import MOST_RANKED, row_of_group

OPTIONS, SHARES = "options", "shares"
CHOICE_COLUMNS = ("choice", "answer", "selected")


def is_choice_of_options(names: Collection[str]) -> bool:
    """Whether there is a list of options, with the one that was chosen or the share of each."""
    return OPTIONS in names and (SHARES in names or first_of(CHOICE_COLUMNS, names) is not None)


def rows(records: Iterator[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    """Turn each question into pairs of a chosen option and each other one, with a ``group_id`` in common.

    They are one choice among several, -log P = -log(e^(r_j) / sum_l e^(r_l)), see
    `choices.plackett_luce`. With shares q of all options, there is a choice of each option j that has one,
    of weight q_j, so that the loss is the cross-entropy -sum_j q_j log P_j.
    """
    for number, record in records:
        if isinstance(record, Refusal):
            yield number, record
            continue
        weights = _weights(record)
        if isinstance(weights, Refusal):
            yield number, weights
            continue
        options, choice = record[OPTIONS], first_of(CHOICE_COLUMNS, list(record))
        row = row_of_group(record, options, number, used=(OPTIONS, SHARES, choice))
        for chosen, weight in zip(options, weights, strict=True):
            weighted = row if weight is None else {**row, "weight": weight}
            for rejected in options if weight != 0 else ():
                if rejected != chosen:
                    yield number, {**weighted, "chosen": chosen, "rejected": rejected}


def _weights(record: Mapping[str, Any]) -> Sequence[float | None] | Refusal:
    """Return the weight of each option as the chosen one, 0 for none and None for that of the row.

    A question whose options or choice cannot be understood is refused.
    """
    options: Any = record.get(OPTIONS)
    is_list = isinstance(options, (list, tuple))
    if not is_list or not all(isinstance(one, str) and one.strip() for one in options):
        allowed, cure = "a list of texts that are not blank", "Write the options as texts"
        return refusal(Reason.BAD_OPTIONS, OPTIONS, options, allowed, cure)
    if not 2 <= len({one.strip() for one in options}) == len(options) <= MOST_RANKED:
        allowed = f"2 to {MOST_RANKED} different options"
        return refusal(
            Reason.BAD_OPTIONS, OPTIONS, list(options), allowed, "Leave the question out"
        )
    if record.get(SHARES) is not None:
        return _shares(record[SHARES], len(options))
    column = first_of(CHOICE_COLUMNS, list(record))
    choice = None if column is None else record[column]
    place = options.index(choice) if choice in options else choice
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(options):
        allowed, cure = "one of the options, or its place from 0", "Leave out what was not answered"
        return refusal(Reason.BAD_OPTIONS, column or CHOICE_COLUMNS[0], choice, allowed, cure)
    return [None if n == place else 0.0 for n in range(len(options))]


def _shares(shares: Any, n_options: int) -> list[float] | Refusal:
    """Return how often each option was chosen, as given."""
    numbers = shares if isinstance(shares, (list, tuple)) else ()
    is_good = len(numbers) == n_options and all(
        isinstance(one, (int, float)) and not isinstance(one, bool) and 0 <= one < math.inf
        for one in numbers
    )
    if not is_good or sum(numbers) == 0:
        allowed = "a number from 0 for each option, and one above 0"
        cure = "Give how often, or with what probability, each option was chosen"
        return refusal(Reason.BAD_OPTIONS, SHARES, shares, allowed, cure)
    return [float(one) for one in numbers]
