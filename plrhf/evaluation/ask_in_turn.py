"""Asks the new users of few-shot trials one pair after the other, each chosen by what they said before."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from plrhf.core.errors import bad_value
from plrhf.evaluation.elicitation import Candidates, Rule, candidates_of, choose
from plrhf.evaluation.trials import Trial
from plrhf.models.adaptation.base import Adaptation, AdaptedUsers
from plrhf.models.pair_batches import batches_of

if TYPE_CHECKING:
    from plrhf.evaluation.few_shot import FewShotTrials


def ask_in_turn(
    curve: FewShotTrials, adaptation: Adaptation, rule: Rule, most: int, *, seed: int
) -> list[list[Trial]]:
    """Return the trials with `most` pairs given, in the order in which the rule asks them.

    A trial's candidates are its pairs given. After each answer all users are fitted anew. No rule depends
    on which response of a candidate was chosen, so none knows an answer before it is given.

    Args:
        rule: one of `elicitation.RULES`. seed: of ``random``.

    Raises:
        ValueError: the adaptation gives no covariance.
    """
    generator = np.random.default_rng(seed)
    left = [list(trial.given) for trial in curve.trials]
    asked: list[list[int]] = [[] for _ in left]
    slopes: list[list[np.ndarray]] = [[] for _ in left]
    for _ in range(most):
        found = _candidates(curve, _fitted(curve, adaptation, asked), left)
        for number, some in enumerate(found):
            before = np.array(slopes[number]).reshape(-1, some.slopes.shape[1])
            place = choose(rule, some, generator, asked=before)
            asked[number].append(left[number].pop(place))
            slopes[number].append(some.slopes[place])
    trials = [replace(t, given=given) for t, given in zip(curve.trials, asked, strict=True)]
    n_users = curve.n_users
    return [trials[start : start + n_users] for start in range(0, len(trials), n_users)]


def _fitted(curve: FewShotTrials, adaptation: Adaptation, asked: list[list[int]]) -> AdaptedUsers:
    """Fit the user of each trial to the pairs asked so far."""
    users = curve.fit_to(adaptation, asked, curve.features)
    if users.covariance is None:
        raise bad_value(
            "eval.elicitation",
            type(adaptation).__name__,
            "random with a rule that does not say how well users are known",
            "Set eval.adaptation.laplace=true, or eval.elicitation=random",
        )
    return users


def _candidates(
    curve: FewShotTrials, users: AdaptedUsers, left: list[list[int]]
) -> list[Candidates]:
    """Return the pairs left to ask in each trial, as the model sees them for its user."""
    places = [place for one in left for place in one]
    owners = [number for number, one in enumerate(left) for _ in one]
    batches = batches_of(curve.dataset, places, owners, batch_size=curve.batch_size)
    found = candidates_of(curve.model, batches, users)
    ends = np.cumsum([len(one) for one in left])[:-1]
    parts = (np.split(values, ends) for values in (found.margins, found.slopes, found.variances))
    return [Candidates(*three) for three in zip(*parts, strict=True)]
