"""Feature schema: standardised on training users, each once; codes, gaps and JSON round trip."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from plrhf.data.features import FeatureSchema
from plrhf.data.reasons import RefusedRow
from plrhf.data.rows import Features, Row


def row(user: str, features: Features | None) -> Row:
    return Row(
        prompt="p",
        chosen="a",
        rejected="b",
        user_id=user,
        prompt_id="p",
        pair_id="x",
        user_features=features,
    )


TRAIN = [
    row("ann", {"age": 20.0, "job": "cook", "zeal": 0.1}),
    row("ann", {"age": 20.0, "job": "cook", "zeal": 0.1}),
    row("bob", {"age": 40.0, "job": "baker", "zeal": 0.1, "city": "Ulm"}),
    row("cat", None),
    row("dan", {"age": 60.0, "job": "cook", "zeal": 0.1}),
    row("eve", {"job": "baker", "city": "Ulm"}),
]


def assert_same(found: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_layout_is_sorted_numbers_then_sorted_categories() -> None:
    schema = FeatureSchema.fit(TRAIN)
    assert schema.numbers == ("age", "zeal")
    assert schema.categories == ("city", "job")
    assert schema.category_sizes == (1, 2)
    assert schema.n_features == 4


def test_each_user_counts_once() -> None:
    # ages 20, 40, 60: mean 40, deviation sqrt(800 / 3); zeal is constant, so it stays 0
    deviation = math.sqrt(800 / 3)
    encode = FeatureSchema.fit(TRAIN).encode
    assert_same(encode({"age": 20.0, "job": "cook", "zeal": 0.1}), [-20 / deviation, 0, np.nan, 1])
    assert_same(
        encode({"age": 50.0, "job": "baker", "city": "Ulm"}), [10 / deviation, np.nan, 0, 0]
    )
    assert_same(encode({"zeal": 2.1}), [np.nan, 2.0, np.nan, np.nan])


def test_a_category_of_one_user_leaves_no_trace() -> None:
    alone = [row("gus", {"job": "spy", "nickname": "Q"}), row("gus", {"job": "spy"})]
    schema = FeatureSchema.fit([*TRAIN, *alone])
    assert schema.categories == ("city", "job", "nickname")
    assert schema.category_sizes == (1, 2, 0)
    assert not {"spy", "Q"} & set(json.dumps(schema.to_dict()).split('"'))
    assert_same(schema.encode({"job": "spy", "nickname": "Q"}), [np.nan] * 5)


def test_missing_unseen_and_unknown() -> None:
    encode = FeatureSchema.fit(TRAIN).encode
    assert_same(encode(None), [np.nan] * 4)
    assert_same(encode({}), [np.nan] * 4)
    assert_same(encode({"job": "poet", "shoe": 43.0, "city": ""}), [np.nan] * 4)


def test_users_without_features_give_an_empty_schema() -> None:
    schema = FeatureSchema.fit([row("ann", None)])
    assert (schema.numbers, schema.category_sizes, schema.n_features) == ((), (), 0)
    assert schema.encode({"age": 3.0}) == []


def test_a_value_of_the_other_kind_is_read_as_the_features_own() -> None:
    encode = FeatureSchema.fit(TRAIN).encode
    with pytest.raises(ValueError, match=r"user_features.age='old' is not allowed: expected a num"):
        encode({"age": "old"})
    assert_same(encode({"age": "N/A"}), encode({}))
    assert_same(encode({"age": "31"}), encode({"age": 31.0}))
    assert_same(encode({"job": 3.0}), encode({"job": "3"}))


def test_raw_features_are_checked_like_a_rows() -> None:
    schema = FeatureSchema.fit(
        [row("ann", {"age": 1.0, "owner": "true"}), row("b", {"age": 3.0, "owner": "true"})]
    )
    assert_same(schema.encode_raw({"age": 4, "owner": True}), [2.0, 0])
    assert_same(schema.encode_raw({"age": None, "owner": False}), [np.nan, np.nan])
    assert_same(schema.encode_raw(None), [np.nan, np.nan])
    with pytest.raises(ValueError, match="user_features='ages' .* expected one of age, owner"):
        schema.encode_raw({"ages": 4})
    with pytest.raises(RefusedRow, match=r"user_features.age=\[4\] is not allowed"):
        schema.encode_raw({"age": [4]})


def test_round_trip_through_json() -> None:
    schema = FeatureSchema.fit(TRAIN)
    state: dict[str, Any] = json.loads(json.dumps(schema.to_dict(), sort_keys=True))
    assert FeatureSchema.from_dict(state) == schema
    assert state["categories"] == {"city": ["Ulm"], "job": ["baker", "cook"]}
