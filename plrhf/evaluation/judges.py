"""Judges, which decide which of two texts a user prefers, and the win rates they give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from plrhf.core.bootstrap import Array, Estimate
from plrhf.core.errors import bad_value
from plrhf.core.stats import Outcomes, correctness, summarise_outcomes
from plrhf.evaluation.generations import GeneratedText
from plrhf.evaluation.records import Record


@dataclass(frozen=True)
class Contest:
    """Two texts for the same user on the same prompt."""

    ours: GeneratedText
    theirs: GeneratedText


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """A judge's decisions on N contests.

    Attributes:
        wins: 1 if our text won, 0 if it lost, 0.5 for a tie, and NaN if the judge gave no answer. It
            is [N, 2] if the order of the texts may matter to the judge (first with our text first,
            then with it second), else [N, 1].
        answers: number of questions, and of missing answers by reason; None if the judge always
            answers.
        cost: number of distinct questions, how many were answered in an earlier run, tokens, price.
    """

    wins: Array
    answers: dict[str, int] | None = None
    cost: dict[str, Any] | None = None


class UserWins(TypedDict):
    """One user's win rate."""

    win_rate: float
    n_texts: int


class WinRates(Record):
    """The numbers of winrate.json.

    Attributes:
        win_rate, win_rate_macro: over all texts, and as the mean over users of their own rates.
        ties: share of texts that tied. n_unanswered: contests with a missing answer.
        first_position_wins: how often the text that is shown first wins; None if order can't matter.
        answers, cost: see `Verdicts`.
    """

    win_rate: Estimate
    win_rate_macro: Estimate
    ties: float
    n_texts: int
    n_users: int
    n_unanswered: int
    per_user: dict[str, UserWins]
    first_position_wins: float | None
    answers: dict[str, int] | None
    cost: dict[str, Any] | None


class JudgedRun(WinRates):
    """The content of winrate.json: the win rates of a run's texts against another run's.

    Attributes:
        fingerprint: fingerprint of the run's model.
        run, against: directories of the two runs; `against` may be "reference".
        writer: whose texts of the run were judged, see `GeneratedText`.
        judge: settings of the judge.
    """

    fingerprint: str | None = None
    run: str
    writer: str = "policy"
    against: str
    judge: dict[str, Any]


class Judge(ABC):
    """Decides which of two texts a user prefers."""

    @abstractmethod
    def compare(self, contests: Sequence[Contest]) -> Verdicts:
        """Judge N contests, and return the verdicts in their order."""


def win_rates(contests: Sequence[Contest], verdicts: Verdicts) -> WinRates:
    """Compute win rates over the contests without a missing answer.

    A text that wins in one order and loses in the other has tied, so a judge that always prefers the
    first text has no influence. Intervals come from a bootstrap over users; with one user there is
    none.

    Raises:
        ValueError: no contest was answered in full.
    """
    share = verdicts.wins.mean(axis=1)  # [N], NaN where any answer is missing
    judged = np.isfinite(share)
    if not judged.any():
        raise bad_value(
            "eval.judge",
            f"{len(share)} contests, none answered",
            "a judge that answers",
            f"Look at what it said ({verdicts.answers})",
        )
    written = [
        contest.ours for contest, is_judged in zip(contests, judged, strict=True) if is_judged
    ]
    # Arrays of objects: in an array of strings every id would take the width of the longest.
    user = np.array([text.user_id for text in written], dtype=object)
    pair = np.array([f"{text.user_id} {text.prompt_id}" for text in written], dtype=object)
    share, wins = share[judged], verdicts.wins[judged]
    outcomes = Outcomes(pair_id=pair, user_id=user, margin=share - 0.5, correct=share)
    found = summarise_outcomes(outcomes, names=("accuracy_micro", "accuracy_macro"))
    first = None
    if wins.shape[1] == 2:
        first = float(np.mean([wins[:, 0], 1 - wins[:, 1]]))
    return WinRates(
        win_rate=found["accuracy_micro"],
        win_rate_macro=found["accuracy_macro"],
        ties=float((share == 0.5).mean()),
        n_texts=len(share),
        n_users=found["n_users"],
        n_unanswered=int((~judged).sum()),
        per_user={
            str(one): {
                "win_rate": float(share[user == one].mean()),
                "n_texts": int((user == one).sum()),
            }
            for one in np.unique(user)
        },
        first_position_wins=first,
        answers=verdicts.answers,
        cost=verdicts.cost,
    )


class PreferenceJudge(Judge):
    """Judges by the users' true preferences, which are known in synthetic worlds only."""

    def compare(self, contests: Sequence[Contest]) -> Verdicts:
        """See `Judge.compare`.

        Raises:
            ValueError: texts without true scores.
        """
        scores = [(contest.ours.score, contest.theirs.score) for contest in contests]
        if any(one is None for both in scores for one in both):
            raise bad_value(
                "eval/judge",
                "preferences",
                "a judge for texts without true scores, which only simulated users know",
                "Set eval/judge=reward or eval/judge=chat",
            )
        ours, theirs = np.array(scores, dtype=np.float64).T
        return Verdicts(wins=correctness(ours - theirs)[:, None])
