"""Users that training has not seen: which pairs are given and asked, and what a model then says."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from plrhf.data.dataset import PairDataset
from plrhf.data.module import PreferenceData
from plrhf.data.packing import LAYOUTS, LayoutName
from plrhf.data.rows import Row
from plrhf.evaluation.few_shot import FewShotTrials
from plrhf.evaluation.trials import FewShotOptions, Trial, draw_trials, rows_of_users
from plrhf.models.adaptation import Adaptation, AdaptedUsers
from plrhf.models.reward import PersonalRewardModel

NEW = "new users"
"""Name of the split with the pairs of unseen users, given and asked."""


def add_new_users(data: PreferenceData, *, layout: LayoutName) -> set[str]:
    """Add the pairs of unseen users, which training leaves aside, to tokenised data as a split `NEW`.

    Returns:
        Ids of the pairs that may be given and are never asked. Without unseen users nothing is added.
    """
    if len(data.unseen_users()) == 0:
        return set()
    given, asked = rows_of_users(data, "unseen")
    rows, pairs = data.row_tokenizer([*given, *asked])
    data.datasets[NEW] = PairDataset(
        rows, pairs, layout=LAYOUTS[layout], user_index={}, schema=data.schema
    )
    return {row.pair_id for row in given}


@dataclass(frozen=True)
class FewShots:
    """Which pairs of unseen users are given, and which are asked.

    Attributes:
        options: numbers of pairs given, draws. dataset: the pairs. trials: by draw and user.
    """

    options: FewShotOptions
    dataset: PairDataset
    trials: list[list[Trial]]

    @classmethod
    def draw(
        cls, data: PreferenceData, given_ids: set[str], options: FewShotOptions, *, seed: int
    ) -> FewShots | None:
        """Draw the pairs; None where fewer than two unseen users have enough of them."""
        dataset = data.datasets.get(NEW)
        if dataset is None:
            return None
        try:
            trials, _ = draw_trials(dataset.rows, given_ids, options, seed=seed)
        except ValueError:  # too few pairs for the most shots
            return None
        return cls(options, dataset, trials)


def new_user_margins(
    model: PersonalRewardModel, shots: FewShots, rule: Adaptation, *, batch_size: int
) -> tuple[pd.DataFrame, float]:
    """Return margins on the pairs asked after k pairs given, and the seconds that a fit takes a user.

    `who` is ``own`` (fitted to the user's k pairs) or ``wrong`` (to k pairs of another person).

    Args:
        rule: how users are fitted.
    """
    model.eval()
    curve = FewShotTrials(model, shots.dataset, shots.trials, batch_size=batch_size)
    frames, seconds = [], 0.0
    for k in shots.options.shots:
        started = time.perf_counter()
        fitted = curve.fit(rule, k)
        seconds = (time.perf_counter() - started) / curve.n_trials  # of the most pairs
        for who, owners in (("own", curve.own), ("wrong", curve.others)):
            frames.append(_frame(curve, who, k, curve.margins(fitted, owners)))
    nobody = AdaptedUsers(vectors=model.encoder.generic(curve.n_trials).to(model.device))
    frames.append(_frame(curve, "generic", 0, curve.margins(nobody, curve.own)))
    return pd.concat(frames, ignore_index=True), seconds


def unfitted_margins(shots: FewShots, margins: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return margins on the same pairs asked, where nothing is taken from the pairs given.

    Args:
        margins: of all pairs of `FewShots.dataset` [N], by `who`.
    """
    places = [place for of_draw in shots.trials for trial in of_draw for place in trial.asked]
    draws = [
        draw for draw, of_draw in enumerate(shots.trials) for trial in of_draw for _ in trial.asked
    ]
    rows = [shots.dataset.rows[place] for place in places]
    return pd.concat(
        [_margins_frame(rows, draws, who, 0, found[places]) for who, found in margins.items()],
        ignore_index=True,
    )


def _frame(curve: FewShotTrials, who: str, k: int, margins: Any) -> pd.DataFrame:
    rows = [curve.dataset.rows[place] for place in curve.asked]
    draws = [
        number // curve.n_users for number, trial in enumerate(curve.trials) for _ in trial.asked
    ]
    return _margins_frame(rows, draws, who, k, margins)


def _margins_frame(
    rows: Sequence[Row], draws: Sequence[int], who: str, k: int, margins: Any
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "user_kind": "unseen",
            "who": who,
            "shots": k,
            "draw": draws,
            "pair_id": [row.pair_id for row in rows],
            "user_id": [row.user_id for row in rows],
            "margin": margins,
        }
    )
