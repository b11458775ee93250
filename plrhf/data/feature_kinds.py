"""Whether a user feature is a number or a category, and what to do with values of the other kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from plrhf.core.errors import bad_value
from plrhf.data.rows import Person

Kind = Literal["number", "category"]
FeatureKinds = Mapping[str, Kind]

MISSING_VALUES = frozenset({"", "-", "?", "n/a", "na", "nan", "none", "null", "<na>", "missing"})
"""Texts that mean a missing value in a number feature, in lower case."""


def settle_features(
    people: Sequence[Person], kinds: FeatureKinds | None = None
) -> tuple[list[Person], dict[int, str]]:
    """Decide for each feature whether it is a number or a category, and convert all values to that.

    A feature is a number if most users' values are numbers; each user counts once. In a number
    feature, numbers written as text are converted, words for a missing value (`MISSING_VALUES`) count
    as missing, and any other text is an error. In a category feature, a number becomes its text.

    Args:
        people: the users of rows. A user with different features in different rows appears repeatedly.
        kinds: the kinds that a model was trained with; the kinds of other features are decided here.

    Returns:
        The users with converted features, and the error of a user's features by index.
    """
    decided = {**_majority(people), **(kinds or {})}
    settled: list[Person] = []
    refused: dict[int, str] = {}
    for number, person in enumerate(people):
        features: dict[str, float | str] = {}
        for name, value in (person.user_features or {}).items():
            read = as_kind(value, decided[name])
            if read is None and not is_missing(value):
                refused.setdefault(number, str(not_a_number(name, value)))
            elif read is not None:
                features[name] = read
        settled.append(replace(person, user_features=features if len(features) > 0 else None))
    return settled, refused


def as_kind(value: float | str, kind: Kind) -> float | str | None:
    """Convert a value to a number or to a category; None for a text that is not a number."""
    if kind == "category":
        return value if isinstance(value, str) else f"{value:g}"
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def not_a_number(name: str, value: object) -> ValueError:
    """Return the error for a text in a feature that is a number for most users."""
    cure = "Write a number, or leave the feature out where it is not known"
    return bad_value(f"user_features.{name}", value, "a number, as most people have there", cure)


def is_missing(value: object) -> bool:
    """Whether a value is one of `MISSING_VALUES`."""
    return isinstance(value, str) and value.strip().casefold() in MISSING_VALUES


def _majority(people: Sequence[Person]) -> dict[str, Kind]:
    """Decide the kind of each feature by majority over users. Words for missing values don't count."""
    votes: dict[str, Counter[bool]] = {}
    voted: set[tuple[str, str]] = set()
    for person in people:
        for name, value in (person.user_features or {}).items():
            count = votes.setdefault(name, Counter())
            if is_missing(value) or (name, person.user_id) in voted:
                continue
            voted.add((name, person.user_id))
            count[not isinstance(value, str)] += 1
    return {
        name: "number" if count[True] > count[False] else "category"
        for name, count in votes.items()
    }
