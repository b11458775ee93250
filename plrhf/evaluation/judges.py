"""Which of two texts a user likes better: by true preferences, a reward model, or a chat endpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plrhf.core.errors import bad_value
from plrhf.core.stats import Array, Outcomes, correctness, summarise_outcomes
from plrhf.evaluation.generations import GeneratedText


@dataclass(frozen=True)
class Contest:
    """Two texts for the same user on the same prompt."""

    ours: GeneratedText
    theirs: GeneratedText


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What a judge said of N contests.

    Attributes:
        wins: how much of each contest our text won: 1, 0, or 0.5 for a tie; NaN where the judge did
            not say. [N, 2] from a judge who reads one text after the other: asked with ours first,
            and with ours second; else [N, 1].
        answers: number of questions put, and of answers that were none, by reason; None from a
            judge that always answers.
        cost: of the distinct questions: how many, how many of them answered before, tokens, price.
    """

    wins: Array
    answers: dict[str, int] | None = None
    cost: dict[str, Any] | None = None


class Judge(ABC):
    """Says which text each user likes better."""

    @abstractmethod
    def compare(self, contests: Sequence[Contest]) -> Verdicts:
        """Verdicts on N contests, in their order."""


def win_rates(contests: Sequence[Contest], verdicts: Verdicts) -> dict[str, Any]:
    """The figures of winrate.json, from contests answered in full.

    Who wins in one order and loses in the other has tied, so that a judge who always prefers the
    first text says nothing. Intervals are from a bootstrap over users; one user's rate has none.

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
    user = np.array([contest.ours.user_id for contest in contests])[judged]
    prompt = np.array([contest.ours.prompt_id for contest in contests])[judged]
    share, wins = share[judged], verdicts.wins[judged]
    pair = np.array([f"{one} {other}" for one, other in zip(user, prompt, strict=True)])
    outcomes = Outcomes(pair_id=pair, user_id=user, margin=share - 0.5, correct=share)
    found = summarise_outcomes(outcomes, names=("accuracy_micro", "accuracy_macro"))
    first = None
    if wins.shape[1] == 2:
        first = float(np.mean([wins[:, 0], 1 - wins[:, 1]]))
    return {
        "win_rate": found["accuracy_micro"],
        "win_rate_macro": found["accuracy_macro"],
        "ties": float((share == 0.5).mean()),
        "n_texts": len(share),
        "n_users": found["n_users"],
        "n_unanswered": int((~judged).sum()),
        "per_user": {
            str(one): {
                "win_rate": float(share[user == one].mean()),
                "n_texts": int((user == one).sum()),
            }
            for one in np.unique(user)
        },
        "first_position_wins": first,
        "answers": verdicts.answers,
        "cost": verdicts.cost,
    }


class PreferenceJudge(Judge):
    """Goes by the users' true preferences, as only a synthetic world knows them."""

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
                "a judge for texts without true scores, which only data=personas knows",
                "Set eval/judge=reward or eval/judge=chat",
            )
        ours, theirs = np.array(scores, dtype=np.float64).T
        return Verdicts(wins=correctness(ours - theirs)[:, None])
