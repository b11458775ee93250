"""Which pairs of new users are given in a few-shot curve, and which are asked."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from plrhf.core.checks import PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.data.module import PreferenceData
from plrhf.data.rows import Row, choices_of
from plrhf.evaluation.elicitation import Rule


@check_arguments("eval")
@dataclass(frozen=True, kw_only=True)
class FewShotOptions:
    """Which few-shot curve to measure.

    Args:
        shots: numbers of pairs given, from 0, increasing.
        draws: number of random draws of the given pairs for each user, at least 1.
        users: ``unseen``; or ``seen``, which treats train users as new, gives their train pairs and
            asks their val pairs. Choose settings with the latter.
        elicitation: how the pairs given are chosen: at ``random``, or one after the other by what the
            user said before, see `elicitation.choose`. Without pairs that may be given only, half of
            a user's pairs are candidates then, and the others are asked.
    """

    shots: list[int]
    draws: PositiveInt = 5
    users: Literal["unseen", "seen"] = "unseen"
    elicitation: Rule = "random"

    def __post_init__(self) -> None:
        increasing = sorted({one for one in self.shots if one >= 0})
        if len(self.shots) == 0 or self.shots != increasing:
            raise bad_value(
                "eval.shots",
                self.shots,
                "whole numbers from 0, each above the one before",
                "Set eval.shots=[0,1,2,4,8,16]",
            )


@dataclass(frozen=True)
class Trial:
    """One draw for one user: indices of the pairs given, in order, and of the pairs asked."""

    given: list[int]
    asked: list[int]


def judgment_key(row: Row) -> Hashable:
    """Return a key that is equal for choices of the same user between the same texts."""
    return row.user_id, str(row.prompt), frozenset((row.chosen, row.rejected))


def check_trials(trials: Sequence[Sequence[Trial]], rows: Sequence[Row]) -> None:
    """Raise a ValueError if a pair asked, or the same texts, are among the pairs given."""
    for trial in (one for of_draw in trials for one in of_draw):
        given = {judgment_key(rows[place]) for place in trial.given}
        for place in trial.asked:
            if judgment_key(rows[place]) in given:
                raise bad_value(
                    "pairs asked",
                    rows[place].pair_id,
                    "pairs that were not given",
                    "Take what is given out of what is asked",
                )


def rows_of_users(data: PreferenceData, users: str) -> tuple[Sequence[Row], Sequence[Row]]:
    """Return the rows that may be given, and the rows to ask, of "seen" or "unseen" users.

    Unseen users are asked their test rows. Their other rows, which training left out, may be given. If
    a user has test rows only, `draw_trials` gives some of them and asks the others.
    """
    if users == "seen":
        return choices_of(data.splits.train), data.splits.val
    unseen = data.unseen_users()
    asked = [row for row in data.splits.test if row.user_id in unseen]
    asked_ids = {row.pair_id for row in asked}
    given = [
        row
        for row in choices_of(data.rows)
        if row.user_id in unseen and row.pair_id not in asked_ids
    ]
    return given, asked


def draw_trials(
    rows: Sequence[Row], given_ids: set[str], options: FewShotOptions, *, seed: int
) -> tuple[list[list[Trial]], int]:
    """Draw the trials, by draw and user, and count the users with too few pairs for the most shots.

    If a user judged the same texts several times, one pair is kept, an asked one if possible.

    Args:
        rows: the users' rows. given_ids: ids of the pairs that may be given but not asked.
    """
    most = options.shots[-1]
    places: dict[str, tuple[list[int], list[int]]] = {}
    is_given = [row.pair_id in given_ids for row in rows]
    judged: set[Any] = set()
    for place in sorted(range(len(rows)), key=is_given.__getitem__):  # those asked first
        row = rows[place]
        of_user = places.setdefault(row.user_id, ([], []))
        if judgment_key(row) not in judged:
            of_user[not is_given[place]].append(place)
        judged.add(judgment_key(row))
    places = {user: both for user, both in sorted(places.items()) if len(both[1]) > 0}
    rooms = {user: max_shots(*both) for user, both in places.items()}
    enough = [both for user, both in places.items() if rooms[user] >= most]
    if len(enough) < 2:
        raise _too_few(sorted(rooms.values()), options)
    generator = np.random.default_rng(seed)
    all_given = options.elicitation != "random"
    trials = [
        [_draw_trial(given, asked, most, generator, all_given=all_given) for given, asked in enough]
        for _ in range(options.draws)
    ]
    return trials, len(places) - len(enough)


def max_shots(given: Sequence[int], asked: Sequence[int]) -> int:
    """Return how many pairs can be given to a user so that at least one is left to ask."""
    return len(asked) - 1 if len(given) == 0 else len(given)


def _draw_trial(
    given: list[int],
    asked: list[int],
    most: int,
    generator: np.random.Generator,
    *,
    all_given: bool = False,
) -> Trial:
    """Draw at most `most` pairs to give; without a separate set they are taken from the asked ones.

    Args:
        all_given: give all that may be given, or half of the asked ones, for a rule to choose from.
    """
    if len(given) > 0:
        return Trial(generator.permutation(given)[: None if all_given else most].tolist(), asked)
    order = generator.permutation(asked).tolist()
    n_given = max(most, len(order) // 2) if all_given else most
    return Trial(order[:n_given], order[n_given:])


def _too_few(rooms: Sequence[int], options: FewShotOptions) -> Exception:
    """Return the error for fewer than two users with enough pairs.

    Args:
        rooms: sorted `max_shots` of each user.
    """
    if len(rooms) < 2:
        return bad_value(
            f"{options.users} users",
            len(rooms),
            "2 or more with pairs to give and to ask",
            "Train with data.unseen_fraction=0.1 (personas: data.n_unseen_users=40), or name rows "
            "of other people with data=",
        )
    return bad_value(
        "eval.shots",
        options.shots,
        f"at most {rooms[-2]} pairs given, which leaves 2 of {len(rooms)} {options.users} users "
        "some to ask",
        "Lower eval.shots, or give more rows with data= (personas: data.test_pairs_per_user=60)",
    )
