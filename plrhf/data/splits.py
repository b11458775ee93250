"""Which rows train, select and test, and which users the model never meets in training."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from plrhf.core.errors import bad_value
from plrhf.data.rows import SPLITS, Row, Rows

TOO_FEW_PAIRS = "user below data.min_pairs_per_user"
BEYOND_MAX_USERS = "user beyond data.max_users"
UNSEEN_OUTSIDE_TEST = "unseen user outside test"

TRAIN, VAL, TEST = range(len(SPLITS))
Codes = NDArray[np.int8]
"""Of each row, the place of its split in `SPLITS`."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Rows by split, each in reading order; a test user not in `users` is an unseen one."""

    train: Sequence[Row]
    val: Sequence[Row]
    test: Sequence[Row]
    users: tuple[str, ...]  # seen users, sorted; user index in the model = place + 1
    dropped: dict[str, int]  # reason -> rows that are in no split
    shared_prompts: bool = False  # whether test was meant to hold pairs on prompts of train

    def content_hash(self, split: str) -> str:
        """Hash all that the rows of a split hold, every field and their order.

        Two runs have the same hash of "test" exactly if they are evaluated on the same pairs of the
        same people, whatever files the rows came from.
        """
        rows: Sequence[Row] = getattr(self, split)
        return (rows if isinstance(rows, Rows) else Rows.from_rows(rows)).content_hash()


def uniform_hash(key: str, *, salt: str, seed: int) -> float:
    """Return a uniform number in [0, 1) fixed by key, salt and seed in every process and version.

    Unlike a draw from a generator it does not move when other keys come or go.
    """
    digest = blake2b(json.dumps([salt, seed, key]).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: more could round up to 1.0


def is_unseen_user(user_id: str, *, seed: int, unseen_fraction: float) -> bool:
    """Whether the user is among the fraction drawn to be unseen; sources that draw them agree."""
    return uniform_hash(user_id, salt="unseen user", seed=seed) < unseen_fraction


def split_rows(
    rows: Rows,
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
    code = _split_codes(rows, seed=seed, val_fraction=val_fraction, test_fraction=test_fraction)
    if seen_prompt_test_fraction > 0:
        places = np.flatnonzero(code == TRAIN)
        drawn = [
            uniform_hash(str(pair_id), salt="seen prompt", seed=seed) < seen_prompt_test_fraction
            for pair_id in rows.select(places).texts("pair_id")
        ]
        code[places[drawn]] = TEST
    names, user = _users(rows)
    pairs = np.stack([np.bincount(user[code == one], minlength=len(names)) for one in range(3)])
    enough, trained = _which_users(pairs, at_least=min_pairs_per_user, at_most=max_users)
    beyond = enough & (pairs[TRAIN] > 0) & ~trained
    unseen = [is_unseen_user(name, seed=seed, unseen_fraction=unseen_fraction) for name in names]
    seen = trained & ~np.array(unseen, dtype=np.bool_)

    left_out = {
        TOO_FEW_PAIRS: ~enough[user],
        BEYOND_MAX_USERS: beyond[user],
        UNSEEN_OUTSIDE_TEST: (enough & ~beyond & ~seen)[user] & (code != TEST),
    }
    dropped = {reason: int(where.sum()) for reason, where in left_out.items() if where.any()}
    kept = ~np.logical_or.reduce(list(left_out.values()))
    parts = {
        name: rows.select(np.flatnonzero(kept & (code == one))) for one, name in enumerate(SPLITS)
    }
    _check_not_empty(parts, dropped, rows)
    return Splits(
        **parts,
        users=tuple(names[place] for place in np.flatnonzero(seen)),
        dropped=dropped,
        shared_prompts=seen_prompt_test_fraction > 0,
    )


def _which_users(
    pairs: NDArray[np.int64], *, at_least: int, at_most: int | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of U users have enough pairs, and which of these may be trained on.

    Args:
        pairs: by split and user, [3, U], users by id.
    """
    # A user with val rows but no train rows is neither trained nor unseen: below the minimum.
    without_train = np.where(pairs[VAL] == 0, pairs[TEST], 0)
    enough = np.where(pairs[TRAIN] > 0, pairs[TRAIN], without_train) >= at_least
    trainable = np.flatnonzero(enough & (pairs[TRAIN] > 0))
    heaviest = trainable[np.argsort(-pairs[TRAIN, trainable], kind="stable")][:at_most]
    return enough, np.isin(np.arange(pairs.shape[1]), heaviest)


def prompt_keys(row: Row) -> tuple[str, str]:
    """What a prompt is recognised by: its id, and its text, as one text may go by two ids."""
    return f"id {row.prompt_id}", f"text {row.prompt}"


def prompt_kinds(rows: Sequence[Row], splits: Splits) -> list[str]:
    """Whether each row's prompt is one of train: "seen", "unseen"; "unknown" without train rows."""
    if len(splits.train) == 0:
        return ["unknown"] * len(rows)
    known = np.isin(_prompt_hashes(rows), _prompt_hashes(splits.train))
    shared = np.logical_or(known[:, 0], known[:, 1])
    return ["seen" if one else "unseen" for one in shared.tolist()]


def _prompt_hashes(rows: Sequence[Row]) -> NDArray[np.int64]:
    """64 bits of each of a row's `prompt_keys`, [N, 2]: sets of the keys would be large."""
    hashes = (hash(key) for row in rows for key in prompt_keys(row))
    return np.fromiter(hashes, np.int64, 2 * len(rows)).reshape(-1, 2)


def shuffle_users(rows: Rows, *, seed: int) -> Rows:
    """Return the rows with their users (id, text and features) permuted over them.

    The control for personalisation: each user keeps their number of rows but not their choices,
    so what a model still gains is not the person. For train and val rows; test keeps the truth.
    """
    givers = list(range(len(rows)))
    random.Random(seed).shuffle(givers)
    return rows.with_people(rows.person[givers])


def _users(rows: Rows) -> tuple[list[str], NDArray[np.int64]]:
    """Ids of the users, sorted, and each row's place among them, [N]."""
    names = sorted({person.user_id for person in rows.people})
    place = {name: at for at, name in enumerate(names)}
    of_person = np.array([place[person.user_id] for person in rows.people], dtype=np.int64)
    return names, of_person[rows.person]


def _split_codes(rows: Rows, *, seed: int, val_fraction: float, test_fraction: float) -> Codes:
    """Each row's split: its own, or its prompt's place on the hashed unit interval."""
    own: dict[str | None, int] = {None: -1}
    own.update({name: place for place, name in enumerate(SPLITS)})
    codes = _codes(len(rows), (own[name] for name in rows.texts("split")))
    n_own = int((codes >= 0).sum())
    if n_own == len(rows):
        return codes
    if n_own > 0:
        shown = f"{n_own} of {len(rows)} rows"
        raise bad_value("split", shown, "a split in all rows or in none", "Add or remove the rest")

    @lru_cache(maxsize=2**16)
    def of_prompt(prompt_id: str | None) -> int:
        place = uniform_hash(str(prompt_id), salt="prompt", seed=seed)
        if place < test_fraction:
            return TEST
        return VAL if place < test_fraction + val_fraction else TRAIN

    return _codes(len(rows), map(of_prompt, rows.texts("prompt_id")))


def _codes(n_rows: int, codes: Iterator[int]) -> Codes:
    return np.fromiter(codes, np.int8, n_rows)


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


def _check_seen_prompts(fraction: float, rows: Rows) -> None:
    if not 0 <= fraction < 1:
        cure = "Set data.seen_prompt_test_fraction=0.1"
        raise bad_value("data.seen_prompt_test_fraction", fraction, "0 <= fraction < 1", cure)
    if fraction > 0 and any(split is not None for split in rows.texts("split")):
        cure = "Put such pairs into test in the rows, or leave split out of every row"
        raise bad_value(
            "data.seen_prompt_test_fraction", fraction, "0 where rows carry a split", cure
        )


def _check_not_empty(parts: dict[str, Rows], dropped: dict[str, int], rows: Rows) -> None:
    for name in ("train", "test"):
        if len(parts[name]) == 0:
            prompts = len(set(rows.texts("prompt_id")))
            cure = (
                "Lower data.min_pairs_per_user or data.unseen_fraction, change "
                f"data.test_fraction or give more prompts ({len(rows)} rows on {prompts} prompts "
                f"were read, dropped: {dropped})"
            )
            raise bad_value(f"{name} rows", 0, "1 or more", cure)
