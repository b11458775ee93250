"""Divides rows into train, val and test, and holds back unseen users."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from plrhf.core.errors import bad_value
from plrhf.data.rows import SPLITS, Row, Rows
from plrhf.data.split_by import NO_SPLIT, TEST, TRAIN, Codes, SplitBy, draw_splits, uniform_hash
from plrhf.data.store import Indices

TOO_FEW_PAIRS = "user below data.min_pairs_per_user"
BEYOND_MAX_USERS = "user beyond data.max_users"
UNSEEN_OUTSIDE_TEST = "unseen user outside test"
TIE_OUTSIDE_TRAIN = "tie outside train"
RATING_OUTSIDE_TRAIN = "rating outside train, where pairs of ratings are asked"
PROMPT_IN_TWO_SPLITS = "prompt in a later split too, of another conversation"
PAIR_OF_RATINGS = "pair of ratings that train has one by one"

SPLIT_PAIRS = (("train", "val"), ("train", "test"), ("val", "test"))
FEW_PROMPTS = 10  # too few to divide them
VAL_FRACTION, TEST_FRACTION = 0.1, 0.2
"""Fractions of prompts for val and test, unless others are given."""


@dataclass(frozen=True, slots=True)
class Splits:
    """The rows of each split, in reading order.

    Attributes:
        users: ids of the seen users, sorted. A user's index in the model is the index here plus 1. All
            other users of test rows are unseen.
        dropped: number of rows that are in no split, by reason.
        shared_prompts: of which two splits, such as ``train_test``, common prompts were asked for.
        indices: indices of each split's rows among all rows.
        counted: indices of the rows of all users with enough pairs, including unseen users and those
            beyond the largest number of users.
    """

    train: Sequence[Row]
    val: Sequence[Row]
    test: Sequence[Row]
    users: tuple[str, ...]
    dropped: dict[str, int]
    shared_prompts: tuple[str, ...] = ()
    indices: Mapping[str, Indices] = field(default_factory=dict, compare=False)
    counted: Indices = field(default_factory=lambda: np.empty(0, np.int64), compare=False)

    def content_hash(self, split: str) -> str:
        """Hash every field and the order of a split's rows.

        Two runs have the same hash of "test" if and only if they are evaluated on the same pairs of
        the same users, whatever files the rows came from.
        """
        rows: Sequence[Row] = getattr(self, split)
        return (rows if isinstance(rows, Rows) else Rows.from_rows(rows)).content_hash()


def is_unseen_user(user_id: str, *, seed: int, unseen_fraction: float) -> bool:
    """Whether a user is among the fraction of users that are drawn to be unseen.

    `split_rows` and the sources with a protocol of their own both call it, so they draw the same.
    """
    return uniform_hash(user_id, salt="unseen user", seed=seed) < unseen_fraction


def split_rows(
    rows: Rows,
    *,
    seed: int,
    val_fraction: float | None,
    test_fraction: float | None,
    unseen_fraction: float,
    min_pairs_per_user: int,
    max_users: int | None = None,
    seen_prompt_test_fraction: float = 0.0,
    split_by: SplitBy = "prompt",
    fits: NDArray[np.bool_] | None = None,
    applied_by_source: Collection[str] = (),
) -> Splits:
    """Divide rows into train, val and test by prompt, and hold back unseen users.

    1. If rows carry a split, they keep it. Otherwise it is drawn by hashes (`split_by.draw_splits`), as
       a rule so that no prompt is in two splits; `seen_prompt_test_fraction` of the train rows then go
       to test by a hash of their own, as the test pairs on seen prompts.
    2. Rows that do not fit are left out, before anything is counted. So are ties outside train, as no
       response to them is right.
    3. Users with fewer than `min_pairs_per_user` train rows are dropped with all their rows. Users
       without any train row are unseen, and are held to the same minimum on their test rows, so that
       a light user does not come back in as an unseen one.
    4. Of the users left that have train rows, the `max_users` with most of them stay (ties by id).
    5. Of these, a salted hash of the id draws the fraction of unseen ones, who keep their test rows
       alone. Drawing last leaves seen and unseen users under the same bounds, hence comparable.

    Every row that goes nowhere is counted in `Splits.dropped`, except those that do not fit.

    Args:
        val_fraction, test_fraction: of prompts, or of what `split_by` divides; None: 0.1 and 0.2.
        split_by: what no two splits have in common, see `split_by.draw_splits`.
        fits: whether each row is short enough, [N]; None: all are.
        applied_by_source: names of fractions by which the source has divided rows that carry a split.

    Raises:
        ValueError: a setting out of range or without effect, rows with and without a split, no train
            or test rows.
    """
    _check_settings(
        min_pairs_per_user,
        max_users,
        val=val_fraction,
        test=test_fraction,
        unseen=unseen_fraction,
        seen_prompt_test=seen_prompt_test_fraction,
    )
    code = _split_codes(
        rows,
        seed=seed,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seen_prompt_test_fraction=seen_prompt_test_fraction,
        split_by=split_by,
        applied_by_source=applied_by_source,
    )
    fits = np.ones(len(rows), dtype=np.bool_) if fits is None else fits
    n_too_long = int((~fits).sum())
    misplaced = {reason: fits & where for reason, where in _misplaced(rows, code).items()}
    fits = fits & ~np.logical_or.reduce(list(misplaced.values()))
    names, user = _users(rows)
    pairs = np.stack(
        [np.bincount(user[fits & (code == one)], minlength=len(names)) for one in range(3)]
    )
    enough, trained = _which_users(pairs, at_least=min_pairs_per_user, at_most=max_users)
    beyond = enough & (pairs[TRAIN] > 0) & ~trained
    unseen = [is_unseen_user(name, seed=seed, unseen_fraction=unseen_fraction) for name in names]
    seen = trained & ~np.array(unseen, dtype=np.bool_)

    left_out = {
        TOO_FEW_PAIRS: fits & ~enough[user],
        BEYOND_MAX_USERS: fits & beyond[user],
        UNSEEN_OUTSIDE_TEST: fits & (enough & ~beyond & ~seen)[user] & (code != TEST),
    }
    counted = {**misplaced, **left_out}
    dropped = {reason: int(where.sum()) for reason, where in counted.items() if where.any()}
    kept = fits & ~np.logical_or.reduce(list(left_out.values()))
    indices = {name: np.flatnonzero(kept & (code == one)) for one, name in enumerate(SPLITS)}
    parts = {name: rows.select(indices[name]) for name in SPLITS}
    _check_not_empty(parts, dropped, rows, n_too_long=n_too_long)
    return Splits(
        **parts,
        users=tuple(names[place] for place in np.flatnonzero(seen)),
        dropped=dropped,
        shared_prompts=_sharing(split_by, seen_prompt_test_fraction),
        indices=indices,
        counted=np.flatnonzero(fits & enough[user]),
    )


def _sharing(split_by: SplitBy, seen_prompt_test_fraction: float) -> tuple[str, ...]:
    """Return of which two splits the settings ask for common prompts."""
    if split_by != "prompt":
        return tuple(f"{earlier}_{later}" for earlier, later in SPLIT_PAIRS)
    return ("train_test",) if seen_prompt_test_fraction > 0 else ()


def _misplaced(rows: Rows, code: Codes) -> dict[str, NDArray[np.bool_]]:
    """Return which rows, [N], cannot be used in their split, by reason.

    Ties and ratings are in train alone. If there are ratings, pairs of them are in val and test alone.
    """
    is_tie, is_rating = (
        np.array([one is not None for one in rows.texts(name)], dtype=np.bool_)
        for name in ("verdict", "rating_level")
    )
    in_train = code == TRAIN
    return {
        TIE_OUTSIDE_TRAIN: is_tie & ~in_train,
        RATING_OUTSIDE_TRAIN: is_rating & ~in_train,
        PROMPT_IN_TWO_SPLITS: code == NO_SPLIT,
        PAIR_OF_RATINGS: ~is_rating & in_train & is_rating.any(),
    }


def _which_users(
    pairs: NDArray[np.int64], *, at_least: int, at_most: int | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Decide which of U users have enough pairs, and which of these can be seen users, [U] each.

    Args:
        pairs: number of pairs by split and user, [3, U], users by id.
    """
    enough = np.where(pairs[TRAIN] > 0, pairs[TRAIN], pairs[TEST]) >= at_least
    trainable = np.flatnonzero(enough & (pairs[TRAIN] > 0))
    heaviest = trainable[np.argsort(-pairs[TRAIN, trainable], kind="stable")][:at_most]
    return enough, np.isin(np.arange(pairs.shape[1]), heaviest)


def prompt_keys(row: Row) -> tuple[str, str]:
    """Return the keys of a row's prompt: its id and its text. Rows share a prompt if they share one."""
    return f"id {row.prompt_id}", f"text {row.prompt}"


def prompt_kinds(rows: Sequence[Row], splits: Splits) -> list[str]:
    """Return for each row whether its prompt is in train: "seen", "unseen" or "unknown".

    It is "unknown" if there are no train rows.
    """
    if len(splits.train) == 0:
        return ["unknown"] * len(rows)
    known = np.isin(_prompt_hashes(rows), _prompt_hashes(splits.train))
    shared = np.logical_or(known[:, 0], known[:, 1])
    return ["seen" if one else "unseen" for one in shared.tolist()]


def _prompt_hashes(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Hash the `prompt_keys` of each row to 64 bits, [N, 2]. Sets of the keys would take much memory."""
    hashes = (hash(key) for row in rows for key in prompt_keys(row))
    return np.fromiter(hashes, np.int64, 2 * len(rows)).reshape(-1, 2)


def shuffle_users(rows: Rows, *, seed: int) -> Rows:
    """Permute the users (id, text and features) over the rows.

    This is a control: each user keeps their number of rows but not their choices, so whatever a model
    still gains is not personal. It is applied to train and val rows; test rows stay true.
    """
    givers = list(range(len(rows)))
    random.Random(seed).shuffle(givers)
    return rows.with_people(rows.person[givers])


def all_as_test(
    rows: Rows, users: Sequence[str], *, fits: NDArray[np.bool_] | None = None
) -> Splits:
    """Make all rows the test rows of a trained model. If rows carry a split, only "test" is taken.

    Args:
        users: ids of the users that the model was trained on.
        fits: whether each row is short enough, [N]; other rows are left out. None: all are.
    """
    columns = (rows.texts(name) for name in ("split", "verdict", "rating_level"))
    is_test = np.array(
        [
            split in (None, "test") and verdict is None and level is None
            for split, verdict, level in zip(*columns, strict=True)
        ],
        dtype=np.bool_,
    )
    if not is_test.any():
        raise bad_value("test rows", 0, "1 or more", "Give rows without split, or with split=test")
    n_others = int((~is_test).sum())
    test = np.flatnonzero(is_test if fits is None else is_test & fits)
    none = np.empty(0, dtype=np.int64)
    return Splits(
        train=rows.select(none),
        val=rows.select(none),
        test=rows.select(test),
        users=tuple(users),
        dropped={} if n_others == 0 else {"row outside test": n_others},
        indices={"train": none, "val": none, "test": test},
        counted=test,
    )


def with_shuffled_users(splits: Splits, *, seed: int) -> Splits:
    """Apply `shuffle_users` to train and to val rows; test rows stay true."""
    train, val = splits.train, splits.val
    assert isinstance(train, Rows) and isinstance(val, Rows)
    return replace(
        splits, train=shuffle_users(train, seed=seed), val=shuffle_users(val, seed=seed + 1)
    )


def _users(rows: Rows) -> tuple[list[str], NDArray[np.int64]]:
    """Return the sorted ids of the users, and for each row the index of its user, [N]."""
    names = sorted({person.user_id for person in rows.people})
    place = {name: at for at, name in enumerate(names)}
    of_person = np.array([place[person.user_id] for person in rows.people], dtype=np.int64)
    return names, of_person[rows.person]


def _split_codes(
    rows: Rows,
    *,
    seed: int,
    val_fraction: float | None,
    test_fraction: float | None,
    seen_prompt_test_fraction: float,
    split_by: SplitBy,
    applied_by_source: Collection[str],
) -> Codes:
    """Return each row's split: the one it carries, or else one that is drawn, see `draw_splits`."""
    own: dict[str | None, int] = {None: -1}
    own.update({name: place for place, name in enumerate(SPLITS)})
    codes = np.fromiter((own[name] for name in rows.texts("split")), np.int8, len(rows))
    n_own = int((codes >= 0).sum())
    if n_own == len(rows):
        given = {"val_fraction": val_fraction, "test_fraction": test_fraction}
        idle = {name: given[name] for name in given if name not in applied_by_source}
        _check_no_fractions(idle, seen_prompt_test_fraction)
        if split_by != "prompt":
            cure = "Set data.keep_split=false to draw splits anew, or data.split_by=prompt"
            raise bad_value("data.split_by", split_by, "prompt where rows carry a split", cure)
        _check_conversations(rows, codes)
        return codes
    if n_own > 0:
        shown = f"{n_own} of {len(rows)} rows"
        raise bad_value("split", shown, "a split in all rows or in none", "Add or remove the rest")
    if split_by != "prompt" and seen_prompt_test_fraction > 0:
        raise bad_value(
            "data.seen_prompt_test_fraction",
            seen_prompt_test_fraction,
            f"0 where data.split_by={split_by} shares prompts already",
            "Set data.seen_prompt_test_fraction=0",
        )
    for_val = VAL_FRACTION if val_fraction is None else val_fraction
    for_test = TEST_FRACTION if test_fraction is None else test_fraction
    if not for_val + for_test < 1:
        cure = "Lower it so that prompts are left to train on"
        allowed = f"less than 1 - data.test_fraction = {1 - for_test:g}"
        raise bad_value("data.val_fraction", for_val, allowed, cure)

    codes = draw_splits(rows, split_by, seed=seed, val_fraction=for_val, test_fraction=for_test)
    if seen_prompt_test_fraction > 0:
        train = np.flatnonzero(codes == TRAIN)
        names = ("conversation_id", "group_id", "pair_id")
        ids = (rows.select(train).texts(name) for name in names)
        drawn = [
            uniform_hash(str(conversation or group or pair), salt="seen prompt", seed=seed)
            < seen_prompt_test_fraction
            for conversation, group, pair in zip(*ids, strict=True)
        ]
        codes[train[drawn]] = TEST
    return codes


def _check_settings(
    min_pairs_per_user: int, max_users: int | None, **fractions: float | None
) -> None:
    """Raise a ValueError if a number or fraction is out of range."""
    for name, fraction in fractions.items():
        if fraction is not None and not 0 <= fraction < 1:
            cure = f"Set data.{name}_fraction=0.1"
            raise bad_value(f"data.{name}_fraction", fraction, "0 <= fraction < 1", cure)
    if min_pairs_per_user < 1:
        cure = "Set data.min_pairs_per_user=1 to keep every user who has a train row"
        raise bad_value("data.min_pairs_per_user", min_pairs_per_user, "1 or more", cure)
    if max_users is not None and max_users < 1:
        cure = "Set data.max_users=null to keep all"
        raise bad_value("data.max_users", max_users, "1 or more, or null", cure)


def _check_no_fractions(
    fractions: Mapping[str, float | None], seen_prompt_test_fraction: float
) -> None:
    """Raise if fractions are given although rows carry a split, where they have no effect."""
    for name, fraction in fractions.items():
        if fraction is not None:
            cure = f"Set data.{name}=null, or leave split out of every row"
            raise bad_value(f"data.{name}", fraction, "null where rows carry a split", cure)
    if seen_prompt_test_fraction != 0:
        cure = "Put such pairs into test in the rows, or leave split out of every row"
        allowed = "0 where rows carry a split"
        raise bad_value("data.seen_prompt_test_fraction", seen_prompt_test_fraction, allowed, cure)


def _check_conversations(rows: Rows, code: Codes) -> None:
    """Raise a ValueError if rows carry splits that divide a conversation, whose turns share texts."""
    split: dict[str | None, int] = {None: NO_SPLIT}
    for one, own in zip(rows.texts("conversation_id"), code.tolist(), strict=True):
        if one is not None and split.setdefault(one, own) != own:
            shown = f"{one} in {SPLITS[split[one]]} and {SPLITS[own]}"
            cure = "Give all of its rows one split, or set data.keep_split=false"
            raise bad_value("conversation_id", shown, "in one split", cure)


def _check_not_empty(
    parts: dict[str, Rows], dropped: dict[str, int], rows: Rows, *, n_too_long: int
) -> None:
    """Raise a ValueError if there are no train or test rows."""
    for name in ("train", "test"):
        if len(parts[name]) == 0:
            prompts = len(set(rows.texts("prompt_id")))
            left_out = {**dropped, "longer than data.max_tokens": n_too_long}
            counts = ", ".join(f"{reason}: {n}" for reason, n in left_out.items() if n > 0)
            drawn = prompts < FEW_PROMPTS and None in rows.texts("split")
            few = "set data.split_by=pair or user, " if drawn else ""
            cure = (
                f"{'Raise data.max_tokens, lower' if n_too_long > 0 else 'Lower'} "
                f"data.min_pairs_per_user or data.unseen_fraction, {few}change "
                f"data.test_fraction or give more prompts (read: {len(rows)} rows, {prompts} prompts; "
                f"dropped: {counts or 'none'})"
            )
            raise bad_value(f"{name} rows", 0, "1 or more", cure)
