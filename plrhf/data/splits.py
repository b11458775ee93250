"""Which rows train, select and test, and which users the model never meets in training."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from plrhf.data.rows import SPLITS, Row
from plrhf.errors import bad_value

TOO_FEW_PAIRS = "user below data.min_pairs_per_user"
BEYOND_MAX_USERS = "user beyond data.max_users"
UNSEEN_OUTSIDE_TEST = "unseen user outside test"


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows by split, each in reading order; a test user not in `users` is an unseen one."""

    train: list[Row]
    val: list[Row]
    test: list[Row]
    users: tuple[str, ...]  # seen users, sorted; user index in the model = place + 1
    dropped: dict[str, int]  # reason -> rows that are in no split
    shared_prompts: bool = False  # whether test was meant to hold pairs on prompts of train


def assign(key: str, *, salt: str, seed: int) -> float:
    """Return a uniform number in [0, 1) fixed by key, salt and seed in every process and version.

    Unlike a draw from a generator it does not move when other keys come or go.
    """
    digest = blake2b(json.dumps([salt, seed, key]).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: more could round up to 1.0


def is_unseen(user_id: str, *, seed: int, unseen_fraction: float) -> bool:
    """Whether the user is among the fraction drawn to be unseen; sources that draw them agree."""
    return assign(user_id, salt="unseen user", seed=seed) < unseen_fraction


def split_rows(
    rows: Sequence[Row],
    *,
    seed: int,
    val_fraction: float,
    test_fraction: float,
    unseen_fraction: float,
    min_pairs_per_user: int,
    max_users: int | None = None,
    seen_prompt_test_fraction: float = 0.0,
) -> Splits:
    """Divide rows into train, val and test by prompt, and hold back unseen users.

    1. A row's split is its own where the rows carry one (all or none must; the val and test
       fractions are then not used), otherwise that of its ``prompt_id``, drawn by salted hash, so
       that no prompt is in two splits. Of the train rows, `seen_prompt_test_fraction` then go to
       test by a hash of their own: the test pairs on prompts that are seen.
    2. Users with fewer than `min_pairs_per_user` train rows are dropped whole. A user with test
       rows only is unseen by construction and held to the same minimum on these, so that a light
       user of real data does not come back in as an unseen one.
    3. Of the users left that have train rows, the `max_users` with most of them stay (ties by id).
    4. Of these, `unseen_fraction` are drawn by salted hash and keep their test rows only. Drawing
       last leaves seen and unseen users under the same bounds, hence comparable.

    Every row that goes nowhere is counted in `Splits.dropped`.

    Raises:
        ValueError: a setting out of range, rows with and without a split, no train or test rows.
    """
    _check_settings(val_fraction, test_fraction, unseen_fraction, min_pairs_per_user, max_users)
    _check_seen_prompts(seen_prompt_test_fraction, rows)
    names = _split_names(rows, seed=seed, val_fraction=val_fraction, test_fraction=test_fraction)
    for place, row in enumerate(rows):
        if names[place] == "train":
            drawn = assign(row.pair_id, salt="seen prompt", seed=seed) < seen_prompt_test_fraction
            names[place] = "test" if drawn else "train"
    train_pairs, other_pairs = _pair_counts(rows, names)
    all_users = {row.user_id for row in rows}
    # A user with val rows but no train rows is neither trained nor unseen: below the minimum.
    pairs = {
        user: train_pairs[user] if user in train_pairs else other_pairs["test", user]
        for user in all_users
        if user in train_pairs or other_pairs["val", user] == 0
    }
    enough = {user for user, count in pairs.items() if count >= min_pairs_per_user}
    trainable = sorted(enough & train_pairs.keys(), key=lambda user: (-train_pairs[user], user))
    kept = set(trainable[:max_users])
    seen = {u for u in kept if not is_unseen(u, seed=seed, unseen_fraction=unseen_fraction)}
    beyond = set(trainable).difference(kept)

    parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
    dropped: Counter[str] = Counter()
    for row, name in zip(rows, names, strict=True):
        if row.user_id not in enough:
            dropped[TOO_FEW_PAIRS] += 1
        elif row.user_id in beyond:
            dropped[BEYOND_MAX_USERS] += 1
        elif row.user_id not in seen and name != "test":
            dropped[UNSEEN_OUTSIDE_TEST] += 1
        else:
            parts[name].append(row)
    _check_not_empty(parts, dropped, rows)
    return Splits(
        **parts,
        users=tuple(sorted(seen)),
        dropped=dict(dropped),
        shared_prompts=seen_prompt_test_fraction > 0,
    )


def prompt_keys(row: Row) -> tuple[str, str]:
    """What a prompt is recognised by: its id, and its text, as one text may go by two ids."""
    return f"id {row.prompt_id}", f"text {row.prompt}"


def prompt_kinds(rows: Sequence[Row], splits: Splits) -> list[str]:
    """Whether each row's prompt is one of train: "seen", "unseen"; "unknown" without train rows."""
    if len(splits.train) == 0:
        return ["unknown"] * len(rows)
    trained = {key for row in splits.train for key in prompt_keys(row)}
    return ["unseen" if trained.isdisjoint(prompt_keys(row)) else "seen" for row in rows]


def shuffle_users(rows: Sequence[Row], *, seed: int) -> list[Row]:
    """Return the rows with their users (id, text and features) permuted over them.

    The control for personalisation: each user keeps their number of rows but not their choices,
    so what a model still gains is not the person. For train and val rows; test keeps the truth.
    """
    givers = list(rows)
    random.Random(seed).shuffle(givers)
    return [
        replace(
            row,
            user_id=giver.user_id,
            user_text=giver.user_text,
            user_features=giver.user_features,
        )
        for row, giver in zip(rows, givers, strict=True)
    ]


def _pair_counts(
    rows: Sequence[Row], names: Sequence[str]
) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """Return train rows per user, and rows per (split, user) of the other splits."""
    train: Counter[str] = Counter()
    others: Counter[tuple[str, str]] = Counter()
    for row, name in zip(rows, names, strict=True):
        if name == "train":
            train[row.user_id] += 1
        else:
            others[name, row.user_id] += 1
    return train, others


def _split_names(
    rows: Sequence[Row], *, seed: int, val_fraction: float, test_fraction: float
) -> list[str]:
    """Return each row's split: its own, or its prompt's place on the hashed unit interval."""
    own = [row.split for row in rows if row.split is not None]
    if len(own) == len(rows):
        return own
    if len(own) > 0:
        shown = f"{len(own)} of {len(rows)} rows"
        raise bad_value("split", shown, "a split in all rows or in none", "Add or remove the rest")
    names: dict[str, str] = {}
    for prompt_id in {row.prompt_id for row in rows}:
        place = assign(prompt_id, salt="prompt", seed=seed)
        if place < test_fraction:
            names[prompt_id] = "test"
        else:
            names[prompt_id] = "val" if place < test_fraction + val_fraction else "train"
    return [names[row.prompt_id] for row in rows]


def _check_settings(
    val_fraction: float,
    test_fraction: float,
    unseen_fraction: float,
    min_pairs_per_user: int,
    max_users: int | None,
) -> None:
    fractions = {"val": val_fraction, "test": test_fraction, "unseen": unseen_fraction}
    for name, fraction in fractions.items():
        if not 0 <= fraction < 1:
            cure = f"Set data.{name}_fraction=0.1"
            raise bad_value(f"data.{name}_fraction", fraction, "0 <= fraction < 1", cure)
    if not val_fraction + test_fraction < 1:
        cure = "Lower it so that prompts are left to train on"
        allowed = f"less than 1 - data.test_fraction = {1 - test_fraction:g}"
        raise bad_value("data.val_fraction", val_fraction, allowed, cure)
    if min_pairs_per_user < 1:
        cure = "Set data.min_pairs_per_user=1 to keep every user who has a train row"
        raise bad_value("data.min_pairs_per_user", min_pairs_per_user, "1 or more", cure)
    if max_users is not None and max_users < 1:
        cure = "Set data.max_users=null to keep all"
        raise bad_value("data.max_users", max_users, "1 or more, or null", cure)


def _check_seen_prompts(fraction: float, rows: Sequence[Row]) -> None:
    if not 0 <= fraction < 1:
        cure = "Set data.seen_prompt_test_fraction=0.1"
        raise bad_value("data.seen_prompt_test_fraction", fraction, "0 <= fraction < 1", cure)
    if fraction > 0 and any(row.split is not None for row in rows):
        cure = "Put such pairs into test in the rows, or leave split out of every row"
        raise bad_value(
            "data.seen_prompt_test_fraction", fraction, "0 where rows carry a split", cure
        )


def _check_not_empty(
    parts: dict[str, list[Row]], dropped: Counter[str], rows: Sequence[Row]
) -> None:
    for name in ("train", "test"):
        if len(parts[name]) == 0:
            prompts = len({row.prompt_id for row in rows})
            cure = (
                "Lower data.min_pairs_per_user or data.unseen_fraction, change "
                f"data.test_fraction or give more prompts ({len(rows)} rows on {prompts} prompts "
                f"were read, dropped: {dict(dropped)})"
            )
            raise bad_value(f"{name} rows", 0, "1 or more", cure)
