"""Which users and prompts an evaluation looks at, and what the rows say of these users."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from plrhf.data.module import PreferenceData, people_in
from plrhf.data.rows import Person, Row


def evenly(items: Sequence[str], count: int) -> list[str]:
    """`count` of the items (all, if fewer), spread evenly over them."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def first_prompts(rows: Sequence[Row], count: int) -> list[Row]:
    """The first row of each of the first `count` distinct prompts."""
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(row.prompt_id, row)
        if len(distinct) == count:
            break
    return list(distinct.values())


def first_people(data: PreferenceData) -> dict[str, Row | Person]:
    """What the first row of each user says of them."""
    people = [*people_in(data.splits.train), *people_in(data.splits.test)]
    return {one.user_id: one for one in reversed(people)}


def features_of(data: PreferenceData, users: Sequence[str]) -> Tensor:
    """Encoded features of users, [N, F], from their first rows."""
    first = first_people(data)
    return data.schema.table([first[one].user_features if one in first else None for one in users])
