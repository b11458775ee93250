"""Splits: no prompt in two of them, fair treatment of seen and unseen users, every row counted."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from plrhf.data.rows import Row, Rows
from plrhf.data.split_by import TEST, TRAIN, VAL, draw_splits, uniform_hash
from plrhf.data.splits import Splits, prompt_kinds, shuffle_users, split_rows

SETTINGS: dict[str, Any] = {
    "seed": 1,
    "val_fraction": None,
    "test_fraction": None,
    "unseen_fraction": 0.0,
    "min_pairs_per_user": 1,
}


def rows_of(user: str, counts: dict[str | None, int], prompts: int = 997) -> list[Row]:
    """Rows of one user, so many of each own split."""
    splits = [split for split, count in counts.items() for _ in range(count)]
    return [
        Row(
            prompt="p",
            chosen="a",
            rejected="b",
            user_id=user,
            prompt_id=f"p{place * 31 % prompts}",
            pair_id=f"{user}-{place}",
            user_text=f"I am {user}",
            user_features={"name": user},
            split=split,
        )
        for place, split in enumerate(splits)
    ]


def split(rows: Iterable[Row], **changes: Any) -> Splits:
    return split_rows(Rows.from_rows(rows), **{**SETTINGS, **changes})


@pytest.mark.slow
def test_the_uniform_hash_is_fixed_and_even() -> None:
    code = (
        "from plrhf.data.split_by import uniform_hash; print(uniform_hash('key', salt='s', seed=3))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) == uniform_hash("key", salt="s", seed=3)
    assert uniform_hash("key", salt="s", seed=4) != uniform_hash("key", salt="s", seed=3)
    assert uniform_hash("key", salt="t", seed=3) != uniform_hash("key", salt="s", seed=3)
    places = [uniform_hash(str(n), salt="s", seed=0) for n in range(20_000)]
    assert all(0 <= place < 1 for place in places)
    tenths = Counter(int(place * 10) for place in places)
    assert all(abs(tenths[tenth] - 2000) < 200 for tenth in range(10))  # 4.7 deviations


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_prompt_is_in_two_splits(seed: int) -> None:
    rows = [row for user in range(13) for row in rows_of(f"u{user}", {None: 700})]
    parts = split(rows, seed=seed)
    prompts = [{row.prompt_id for row in part} for part in (parts.train, parts.val, parts.test)]
    assert len(set.union(*prompts)) == sum(len(one) for one in prompts) == 700
    assert abs(len(prompts[1]) - 70) < 40 and abs(len(prompts[2]) - 140) < 50
    assert len(parts.train) + len(parts.val) + len(parts.test) == len(rows)
    assert parts.dropped == {}


@pytest.mark.slow
def test_test_pairs_on_seen_prompts_come_out_of_train_alone() -> None:
    rows = [row for user in range(13) for row in rows_of(f"u{user}", {None: 300}, prompts=101)]
    rows = [replace(row, prompt=f"About {row.prompt_id}") for row in rows]
    plain = split(rows, unseen_fraction=0.3)
    kept = split(rows, unseen_fraction=0.3, seen_prompt_test_fraction=0.25)
    assert plain.shared_prompts == () and kept.shared_prompts == ("train_test",)
    assert (kept.val, kept.users) == (plain.val, plain.users)
    before = {row.pair_id for row in plain.test}
    moved = [row for row in kept.test if row.pair_id not in before]
    assert before < {row.pair_id for row in kept.test}
    assert set(prompt_kinds(plain.test, plain)) == {"unseen"}
    kinds = Counter(
        (row.user_id in kept.users, kind, row.pair_id in before)
        for row, kind in zip(kept.test, prompt_kinds(kept.test, kept), strict=True)
    )
    assert set(kinds) == {(seen, *rest) for seen in (True, False) for rest in CELLS}
    of_seen = [row for row in moved if row.user_id in kept.users]
    assert len(of_seen) + len(kept.train) == len(plain.train)
    assert abs(len(of_seen) / len(plain.train) - 0.25) < 0.04


CELLS = (("seen", False), ("unseen", True))  # a prompt's kind, and whether it was test anyway


def test_a_prompt_is_known_by_text_or_id_and_unknown_without_train_rows() -> None:
    train, by_id, by_text, other = (
        replace(rows_of("a", {"train": 1})[0], prompt=prompt, prompt_id=name)
        for prompt, name in (("Tea?", "p1"), ("Tea!", "p1"), ("Tea?", "p2"), ("Tea!", "p3"))
    )
    parts = Splits(train=[train], val=[], test=[by_id, by_text, other], users=("a",), dropped={})
    assert prompt_kinds(parts.test, parts) == ["seen", "seen", "unseen"]
    assert prompt_kinds(parts.test, replace(parts, train=[])) == ["unknown"] * 3


def test_a_prompt_stays_where_it_is_when_rows_are_added() -> None:
    few = rows_of("u", {None: 50})
    more = rows_of("u", {None: 900})
    kept = {row.pair_id for row in few}
    assert [row for row in split(more).test if row.pair_id in kept] == split(few).test


@pytest.mark.parametrize("by", ["prompt", "pair"])
def test_few_prompts_leave_no_split_empty(by: Any) -> None:
    for n_prompts in range(3, 21):
        for seed in range(5):
            rows = Rows.from_rows(rows_of("a", {None: 60}, prompts=n_prompts))
            codes = draw_splits(rows, by, seed=seed, val_fraction=0.1, test_fraction=0.2)
            assert set(codes.tolist()) == {TRAIN, VAL, TEST}
    without_val = draw_splits(rows, by, seed=0, val_fraction=0, test_fraction=0.2)
    assert set(without_val.tolist()) == {TRAIN, TEST}


def test_own_split_is_used_and_order_kept() -> None:
    rows = rows_of("b", {"test": 3, "train": 4}) + rows_of("a", {"train": 2, "val": 1})
    parts = split(rows)
    assert [row.pair_id for row in parts.train] == ["b-3", "b-4", "b-5", "b-6", "a-0", "a-1"]
    assert [row.pair_id for row in parts.val] == ["a-2"]
    assert [row.pair_id for row in parts.test] == ["b-0", "b-1", "b-2"]
    assert parts.users == ("a", "b")


def test_rows_with_and_without_a_split_are_refused() -> None:
    rows = rows_of("a", {"train": 2, None: 5})
    with pytest.raises(ValueError) as caught:
        split(rows)
    assert str(caught.value) == (
        "split='2 of 7 rows' is not allowed: expected a split in all rows or in none. "
        "Add or remove the rest."
    )


def test_minimum_counts_train_rows_and_test_rows_of_test_only_users() -> None:
    rows = [
        *rows_of("enough", {"train": 5, "val": 1, "test": 2}),
        *rows_of("light", {"train": 4, "val": 9, "test": 9}),
        *rows_of("new", {"test": 5}),
        *rows_of("new_light", {"test": 4}),
        *rows_of("no_train", {"val": 7, "test": 8}),
    ]
    parts = split(rows, min_pairs_per_user=5)
    assert parts.users == ("enough",)
    assert Counter(row.user_id for row in parts.test) == {"enough": 2, "new": 5, "no_train": 8}
    assert {row.user_id for row in (*parts.train, *parts.val)} == {"enough"}
    assert parts.dropped == {
        "user below data.min_pairs_per_user": 22 + 4,
        "unseen user outside test": 7,
    }


def test_a_val_row_does_not_cost_an_unseen_user_the_test_rows() -> None:
    rows = rows_of("a", {"train": 2, "test": 2}) + rows_of("b", {"val": 1, "test": 50})
    parts = split(rows)
    assert parts.users == ("a",)
    assert Counter(row.user_id for row in parts.test) == {"a": 2, "b": 50}
    assert parts.dropped == {"unseen user outside test": 1}


def test_users_are_counted_over_the_rows_that_fit() -> None:
    rows = [
        *rows_of("a", {"train": 5, "test": 2}),
        *rows_of("b", {"train": 4, "val": 2, "test": 3}),  # three left to train on
        *rows_of("c", {"train": 9, "test": 4}),  # none left to train on: unseen
        *rows_of("d", {"test": 5}),  # three left
        *rows_of("e", {"train": 6, "test": 1}),
    ]
    too_long = {"a-0", "b-1", *(f"c-{n}" for n in range(9)), "d-0", "d-4"}
    fits = np.array([row.pair_id not in too_long for row in rows])
    parts = split(rows, min_pairs_per_user=4, fits=fits)
    assert parts.users == ("a", "e")
    assert Counter(row.user_id for row in parts.train) == {"a": 4, "e": 6}
    assert Counter(row.user_id for row in parts.test) == {"a": 2, "c": 4, "e": 1}
    assert parts.dropped == {"user below data.min_pairs_per_user": 8 + 3}
    assert not too_long & {row.pair_id for row in (*parts.train, *parts.val, *parts.test)}
    n_kept = len(parts.train) + len(parts.val) + len(parts.test)
    assert n_kept + sum(parts.dropped.values()) + len(too_long) == len(rows)
    heaviest = split(rows, min_pairs_per_user=4, fits=fits, max_users=1)
    assert heaviest.users == ("e",)


def test_indices_are_those_of_the_rows() -> None:
    rows = [
        *rows_of("a", {"train": 5, "val": 1, "test": 2}),
        *rows_of("light", {"train": 1, "test": 9}),
        *rows_of("b", {"train": 4, "test": 3}),
    ]
    parts = split(rows, min_pairs_per_user=2, max_users=1)
    for name, part in (("train", parts.train), ("val", parts.val), ("test", parts.test)):
        assert [rows[index] for index in parts.indices[name]] == list(part)
    assert {rows[index].user_id for index in parts.counted} == {"a", "b"}
    assert len(parts.counted) == 8 + 7


def test_max_users_keeps_the_heaviest_with_ties_by_id() -> None:
    train = {"d": 3, "c": 7, "b": 3, "a": 2}
    rows = [row for user, n in train.items() for row in rows_of(user, {"train": n, "test": 1})]
    rows += rows_of("new", {"test": 2})
    parts = split(rows, max_users=2)
    assert parts.users == ("b", "c")
    assert {row.user_id for row in parts.test} == {"b", "c", "new"}
    assert parts.dropped == {"user beyond data.max_users": 4 + 3}


def test_unseen_users_keep_test_rows_only_and_face_the_same_minimum() -> None:
    rows = [
        row for n in range(300) for row in rows_of(f"u{n}", {"train": n % 7, "val": 1, "test": 2})
    ]
    parts = split(rows, unseen_fraction=0.3, min_pairs_per_user=4)
    train_users = {row.user_id for row in parts.train}
    test_users = {row.user_id for row in parts.test}
    unseen = test_users - set(parts.users)
    eligible = {f"u{n}" for n in range(300) if n % 7 >= 4}
    assert train_users == {row.user_id for row in parts.val} == set(parts.users)
    assert test_users == eligible
    assert 0.15 < len(unseen) / len(eligible) < 0.45
    assert unseen == {
        user for user in eligible if uniform_hash(user, salt="unseen user", seed=1) < 0.3
    }
    total = len(parts.train) + len(parts.val) + len(parts.test) + sum(parts.dropped.values())
    assert total == len(rows)
    assert parts.dropped["unseen user outside test"] == sum(
        int(user[1:]) % 7 + 1 for user in unseen
    )
    assert split(rows, unseen_fraction=0.3, seed=2).users != parts.users


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_fraction": -0.1}, "data.val_fraction=-0.1 is not allowed: expected 0 <= fraction"),
        ({"test_fraction": 1.0}, "data.test_fraction=1.0 is not allowed: expected 0 <= fraction"),
        ({"unseen_fraction": float("nan")}, "data.unseen_fraction=nan is not allowed"),
        ({"val_fraction": 0.1}, "data.val_fraction=0.1 .* null where rows carry a split"),
        ({"test_fraction": 0.0}, "data.test_fraction=0.0 .* null where rows carry a split"),
        ({"min_pairs_per_user": 0}, "data.min_pairs_per_user=0 is not allowed: expected 1 or"),
        ({"seen_prompt_test_fraction": 1}, "data.seen_prompt_test_fraction=1 is not .* < 1"),
        (
            {"seen_prompt_test_fraction": 0.1},
            "data.seen_prompt_test_fraction=0.1 is not allowed: expected 0 where rows carry a split. "
            "Put such pairs into test in the rows",
        ),
        ({"max_users": 0}, "data.max_users=0 is not allowed: .* Set data.max_users=null"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        split(rows_of("a", {"train": 2, "test": 2}), **changes)


def test_val_and_test_fractions_must_leave_prompts_to_train_on() -> None:
    with pytest.raises(ValueError, match=r"^data.val_fraction=0.8 .* 1 - data.test_fraction = 0.8"):
        split(rows_of("a", {None: 9}), val_fraction=0.8)


def test_fractions_that_the_source_has_applied_are_not_refused() -> None:
    rows = rows_of("a", {"train": 2, "test": 2})
    assert split(rows, val_fraction=0.1, applied_by_source={"val_fraction"}) == split(rows)
    with pytest.raises(ValueError, match="^data.test_fraction=0.3 .* where rows carry a split"):
        split(rows, test_fraction=0.3, applied_by_source={"val_fraction"})


def test_no_train_or_test_rows_is_an_error_with_the_cure() -> None:
    with pytest.raises(ValueError) as caught:
        split(rows_of("a", {"train": 2, "test": 3}), min_pairs_per_user=3)
    assert str(caught.value) == (
        "train rows=0 is not allowed: expected 1 or more. Lower data.min_pairs_per_user or "
        "data.unseen_fraction, change data.test_fraction or give more prompts (read: 5 rows, 5 "
        "prompts; dropped: user below data.min_pairs_per_user: 5)."
    )
    with pytest.raises(ValueError, match=r"Raise data.max_tokens, lower .*max_tokens: 1\)\.$"):
        split(rows_of("a", {"train": 1, "test": 1}), fits=np.array([False, True]))
    with pytest.raises(ValueError, match="^test rows=0 is not allowed"):
        split(rows_of("a", {"train": 2}))
    with pytest.raises(ValueError, match="^train rows=0 is not allowed"):
        split([])


def test_shuffle_users_breaks_the_link_and_nothing_else() -> None:
    rows = [row for n in range(9) for row in rows_of(f"u{n}", {"train": 10 * n + 3})]
    kept = Rows.from_rows(rows)
    shuffled = shuffle_users(kept, seed=5)
    assert [row.pair_id for row in shuffled] == [row.pair_id for row in rows]
    assert Counter(row.user_id for row in shuffled) == Counter(row.user_id for row in rows)
    assert all(row.user_text == f"I am {row.user_id}" for row in shuffled)
    assert all(row.user_features == {"name": row.user_id} for row in shuffled)
    sizes = Counter(row.user_id for row in rows)
    by_chance = sum((size / len(rows)) ** 2 for size in sizes.values())
    same = [old.user_id == new.user_id for old, new in zip(rows, shuffled, strict=True)]
    assert abs(sum(same) / len(rows) - by_chance) < 0.08
    assert shuffle_users(kept, seed=5) == shuffled != shuffle_users(kept, seed=6)


def judged(n_users: int = 40, n_texts: int = 500) -> list[Row]:
    """Rows on one prompt: each user compares neighbouring texts of an order of their own, one twice."""
    rows = []
    for user in range(n_users):
        order = random.Random(user).sample(range(n_texts), 30)
        pairs = [*zip(order[::2], order[1::2], strict=True), (order[0], order[1])]
        rows += [
            replace(
                rows_of(f"u{user}", {None: 1})[0],
                prompt="Which is better?",
                prompt_id="only",
                chosen=f"text {one}",
                rejected=f"text {other}",
                pair_id=f"{user}-{place}",
            )
            for place, (one, other) in enumerate(pairs)
        ]
    return rows


@pytest.mark.parametrize("by", ["response", "pair", "user"])
def test_rows_on_one_prompt_can_be_divided(by: Any) -> None:
    rows = judged()
    with pytest.raises(ValueError, match=r"set data\.split_by=pair or user"):
        split(rows)
    parts = split(rows, split_by=by, val_fraction=0.15, test_fraction=0.25)
    assert parts.shared_prompts and parts.dropped == {}
    sizes = [len(part) / len(rows) for part in (parts.train, parts.val, parts.test)]
    assert sizes == pytest.approx([0.6, 0.15, 0.25], abs=0.08)
    keys: Any = {
        "pair": lambda row: frozenset((row.chosen, row.rejected)),
        "user": lambda row: (row.user_id, frozenset((row.chosen, row.rejected))),
    }
    if by == "response":
        known: set[str] = set()
        for part in (parts.train, parts.val, parts.test):
            assert len(known) == 0 or all({row.chosen, row.rejected} - known for row in part)
            known |= {text for row in part for text in (row.chosen, row.rejected)}
    else:
        found = [set(map(keys[by], part)) for part in (parts.train, parts.val, parts.test)]
        assert len(set.union(*found)) == sum(map(len, found))
    if by == "user":  # 15 distinct pairs each: places 0.5 / 15 and so on, below 0.25 and 0.4
        tests = Counter({(row.user_id, row.chosen, row.rejected) for row in parts.test})
        of_users = Counter(user for user, *_ in tests)
        assert set(of_users.values()) == {4} and len(of_users) == 40


def test_ways_to_split_that_have_no_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="^data.split_by='pair' .* where rows carry a split"):
        split(rows_of("a", {"train": 2, "test": 2}), split_by="pair")
    with pytest.raises(ValueError, match="^data.seen_prompt_test_fraction=0.1 .*shares prompts"):
        split(judged(2), split_by="user", seen_prompt_test_fraction=0.1)
