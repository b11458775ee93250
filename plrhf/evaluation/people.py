"""Chooses users and prompts for an evaluation, and looks up what rows say of users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from plrhf.data.module import PreferenceData
from plrhf.data.rows import Person, Row, people_in

T = TypeVar("T")


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Choose `count` of the items at even distances; all of them if there are fewer."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def first_prompts(rows: Sequence[Row], count: int) -> list[Row]:
    """Return the first row of each of the first `count` distinct prompts."""
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(row.prompt_id, row)
        if len(distinct) == count:
            break
    return list(distinct.values())


def first_people(data: PreferenceData) -> dict[str, Row | Person]:
    """Return each user as described by their first train or test row, by user id."""
    people = [*people_in(data.splits.train), *people_in(data.splits.test)]
    return {one.user_id: one for one in reversed(people)}


def features_of(data: PreferenceData, users: Sequence[str]) -> Tensor:
    """Encode the features of users, as their first rows give them, [N, F]."""
    first = first_people(data)
    return data.schema.table([first[one].user_features if one in first else None for one in users])
