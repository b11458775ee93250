"""Encodes the features of users as the vectors that a model reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import Any

import torch
from torch import Tensor

from plrhf.core.errors import bad_value
from plrhf.data.feature_kinds import FeatureKinds, Kind, as_kind, is_missing, not_a_number
from plrhf.data.parsing import parse_features
from plrhf.data.rows import Features, Person, Row


@dataclass(frozen=True)
class FeatureSchema:
    """The encoding of user features as numbers: means, deviations and category codes.

    An encoded user has F = `n_features` numbers: the number features, then the category features, each
    group sorted by name. Missing and unknown values are NaN.
    """

    moments: Mapping[str, tuple[float, float]]  # number feature -> mean, standard deviation
    codes: Mapping[str, Mapping[str, int]]  # category feature -> value -> code from 0

    @classmethod
    def fit(cls, rows: Iterable[Row | Person]) -> FeatureSchema:
        """Learn the schema from the users of (train) rows. Each user's first value counts.

        A category value that only one user has gets no code and counts as missing. Others cannot profit
        from it, and an export must not keep it when that user is forgotten.

        `settle_features` must have been applied, so that each feature has one kind of value.
        """
        values: dict[str, dict[str, float | str]] = {}  # feature -> user -> value
        for row in rows:
            for name, value in (row.user_features or {}).items():
                by_user = values.setdefault(name, {})
                by_user.setdefault(row.user_id, value)
        moments: dict[str, tuple[float, float]] = {}
        codes: dict[str, dict[str, int]] = {}
        for name in sorted(values):
            numbers = [one for one in values[name].values() if not isinstance(one, str)]
            if len(numbers) > 0:
                # pstdev sums exactly, so the deviation of a constant feature is exactly 0.
                deviation = pstdev(numbers)
                moments[name] = (float(mean(numbers)), 1.0 if deviation == 0 else deviation)
            else:
                n_users = Counter(map(str, values[name].values()))
                shared = sorted(text for text, count in n_users.items() if count > 1)
                codes[name] = {text: code for code, text in enumerate(shared)}
        return cls(moments=moments, codes=codes)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of the number features, in encoding order."""
        return tuple(self.moments)

    @property
    def categories(self) -> tuple[str, ...]:
        """The names of the category features, in encoding order after the numbers."""
        return tuple(self.codes)

    @property
    def category_sizes(self) -> tuple[int, ...]:
        """How many values each category feature has in training."""
        return tuple(len(codes) for codes in self.codes.values())

    @property
    def n_features(self) -> int:
        """F, the length of an encoded user."""
        return len(self.moments) + len(self.codes)

    def kinds(self) -> FeatureKinds:
        """Return the kind of each feature by name, for reading rows of other users."""
        numbers: dict[str, Kind] = dict.fromkeys(self.moments, "number")
        return {**numbers, **dict.fromkeys(self.codes, "category")}

    def encode(self, user_features: Features | None) -> list[float]:
        """Encode one user's features as F numbers, in units of the training deviations.

        Features that the schema does not have are ignored.

        Raises:
            ValueError: a text that is no number where training had numbers.
        """
        given = user_features or {}
        encoded = []
        for name, (centre, deviation) in self.moments.items():
            value = as_kind(given.get(name, math.nan), "number")
            if value is None:
                if not is_missing(given[name]):
                    raise not_a_number(name, given[name])
                value = math.nan
            encoded.append((float(value) - centre) / deviation)
        for name, codes in self.codes.items():
            category = as_kind(given.get(name, ""), "category")
            known = name in given and category in codes
            encoded.append(float(codes[str(category)]) if known else math.nan)
        return encoded

    def table(self, users: Sequence[Features | None]) -> Tensor:
        """Encode the features of N users, [N, F] float32."""
        encoded = [self.encode(features) for features in users]
        return torch.tensor(encoded, dtype=torch.float32).view(len(users), self.n_features)

    def encode_raw(self, user_features: Mapping[str, Any] | None) -> list[float]:
        """Check features like those of a row and encode them, e.g. for a server.

        Raises:
            ValueError: a value that rows may not have, or a feature that training did not have.
        """
        checked = parse_features(user_features, "user_features")
        for name in checked or {}:
            if name not in self.moments and name not in self.codes:
                known = ", ".join((*self.numbers, *self.categories)) or "no features at all"
                cure = "Leave it out or correct its name"
                raise bad_value("user_features", name, f"one of {known}", cure)
        return self.encode(checked)

    def to_dict(self) -> dict[str, Any]:
        """Return the schema as JSON-able dicts and lists, for `from_dict`."""
        return {
            "numbers": {n: {"mean": m, "deviation": d} for n, (m, d) in self.moments.items()},
            "categories": {name: list(codes) for name, codes in self.codes.items()},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> FeatureSchema:
        """Return the schema that `to_dict` wrote."""
        numbers, categories = state["numbers"], state["categories"]
        return cls(
            moments={n: (numbers[n]["mean"], numbers[n]["deviation"]) for n in sorted(numbers)},
            codes={
                name: {value: code for code, value in enumerate(categories[name])}
                for name in sorted(categories)
            },
        )


NO_FEATURES = FeatureSchema(moments={}, codes={})
"""The schema of users who are described by nothing."""
