"""Accuracy of the predictions that a model is most sure of, if it may leave the others unanswered."""

from __future__ import annotations

import math

import numpy as np

from plrhf.core.bootstrap import Estimate
from plrhf.core.stats import Outcomes, summarise_outcomes

SHARES = (1.0, 0.75, 0.5, 0.25)
"""Shares of the pairs that are answered."""


def abstention_curve(outcomes: Outcomes) -> list[Estimate]:
    """Compute the accuracy on the surest share of the pairs, for each of `SHARES`.

    Sure are predictions with a large absolute margin. Intervals are a bootstrap over users.
    """
    order = np.argsort(-np.abs(outcomes.margin), kind="stable")
    found = []
    for share in SHARES:
        kept = np.sort(order[: math.ceil(share * len(order))])
        some = Outcomes(
            pair_id=outcomes.pair_id[kept],
            user_id=outcomes.user_id[kept],
            margin=outcomes.margin[kept],
            correct=outcomes.correct[kept],
        )
        found.append(summarise_outcomes(some, names=("accuracy_micro",))["accuracy_micro"])
    return found
