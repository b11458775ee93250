"""Few-shot curves: accuracy on users the model has not seen, by the number of their pairs given.

The given pairs (shots) are those that a user is fitted to. The asked pairs are those predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from plrhf.core.bootstrap import Estimate
from plrhf.core.progress import with_progress
from plrhf.core.stats import (
    Outcomes,
    correctness,
    gain_recovered,
    paired_difference,
    summarise_outcomes,
)
from plrhf.core.types import PreferenceBatch
from plrhf.data.dataset import PairDataset
from plrhf.data.in_context import InContextTokenizer, row_tokenizer
from plrhf.data.module import PreferenceData
from plrhf.data.tokenizer import RowTokenizer
from plrhf.evaluation.abstention import abstention_curve
from plrhf.evaluation.ask_in_turn import ask_in_turn
from plrhf.evaluation.records import Record
from plrhf.evaluation.trials import (
    FewShotOptions,
    Trial,
    check_trials,
    draw_trials,
    rows_of_users,
)
from plrhf.models.adaptation.base import (
    Adaptation,
    AdaptedUsers,
    attenuated_margins,
    score_pairs,
)
from plrhf.models.base import PersonalModule
from plrhf.models.pair_batches import batches_of, compute_per_pair, dataset_of

FITTED = ("adapted", "random", "other_user", "pooled")
"""Which pairs a user is fitted to: their own, random ones of their own where those were not, another
user's, or those of many other users."""

CALIBRATED = ("adapted", "attenuated", "generic")
"""Curves whose likelihood and calibration error are shown in tables."""


class FewShotCurve(Record):
    """adapt.json, schema 1: accuracy by number of pairs given, and the controls.

    Attributes:
        fingerprint: of the model. adaptation: settings of the adaptation rule.
        shots: numbers of pairs given.
        curves: accuracy for each number of shots, by whose pairs users were fitted to (`FITTED`), and
            for ``generic`` (no pairs) and ``oracle`` (None if unknown).
        nll, ece: likelihood in nats and calibration error, as `curves`. ``attenuated`` is ``adapted``
            with margins shrunk by `attenuated_margins`, for rules with a covariance.
        abstention: for each number of shots, accuracy on the surest shares of the pairs asked, see
            `abstention.SHARES`; of ``attenuated`` margins where there are any.
        over_generic: paired difference from the generic user.
        gain_recovered: share of the oracle's gain over the generic user; None without an oracle.
        users, elicitation: of the options. If pairs were not chosen at random, ``random`` is fitted to
            as many random ones of the same candidates. left_out: number of users with too few pairs.
    """

    version: Literal[1] = Field(default=1, alias="schema")
    fingerprint: str | None = None
    adaptation: dict[str, Any] = {}
    shots: list[int]
    curves: dict[str, list[Estimate] | None]
    nll: dict[str, list[Estimate]] = {}
    ece: dict[str, list[Estimate]] = {}
    abstention: list[list[Estimate]] = []
    over_generic: dict[str, list[Estimate]] = {}
    gain_recovered: dict[str, list[Estimate]] | None
    users: str = "unseen"
    elicitation: str = "random"
    n_users: int
    n_draws: int
    left_out: int = 0


def learning_curve(
    model: PersonalModule,
    data: PreferenceData,
    options: FewShotOptions,
    rule: Adaptation,
    *,
    seed: int,
    fingerprint: str | None = None,
) -> FewShotCurve:
    """Measure accuracy on new users' other pairs after k pairs given, and the controls.

    ``adapted`` is fitted to the user's own k pairs. ``other_user`` is fitted to the k pairs of another
    user, and should lose. ``pooled`` is fitted to k pairs of k other users, so its gain is not
    personal. ``generic`` is the generic user. All are asked the same pairs. Intervals are a bootstrap
    over users; `over_generic` and `gain_recovered` are paired.

    Args:
        data: tokenised. rule: how users are fitted. seed: of the draws. fingerprint: of the model.

    Raises:
        ValueError: fewer than two users have enough pairs, or the rule cannot adapt the model.
    """
    model.eval()
    given, asked = rows_of_users(data, options.users)
    tokenizer = row_tokenizer(data.row_tokenizer.tokenizer, data.tokenizer_options)
    dataset = dataset_of(model, tokenizer, [*given, *asked], batch_size=data.eval_batch_size)
    given_ids = {row.pair_id for row in given}
    trials, left_out = draw_trials(dataset.rows, given_ids, options, seed=seed)
    how: Any = {"batch_size": data.eval_batch_size, "row_tokenizer": tokenizer}
    curve = at_random = FewShotTrials(model, dataset, trials, **how)
    if options.elicitation != "random":
        in_turn = ask_in_turn(curve, rule, options.elicitation, options.shots[-1], seed=seed)
        curve = FewShotTrials(model, dataset, in_turn, **how)
    names = ("adapted", "other_user", "pooled", "generic")
    margins: dict[str, list[np.ndarray]] = {name: [] for name in names}
    nobody = AdaptedUsers(vectors=model.encoder.generic(curve.n_trials).detach().to(model.device))
    generic = curve.margins(nobody, curve.own)
    for k in with_progress(options.shots, "fitting new users", total=len(options.shots)):
        users = curve.fit(rule, k)
        margins["adapted"].append(curve.margins(users, curve.own))
        margins["other_user"].append(curve.margins(users, curve.others))
        if users.covariance is not None:
            attenuated = curve.margins(users, curve.own, attenuated=True)
            margins.setdefault("attenuated", []).append(attenuated)
        if at_random is not curve:
            of_random = at_random.margins(at_random.fit(rule, k), curve.own)
            margins.setdefault("random", []).append(of_random)
        margins["pooled"].append(curve.margins(curve.fit(rule, k, pooled=True), curve.own))
        margins["generic"].append(generic)
    true = data.source.oracle_margins()
    if true is not None:
        of_pair = np.array([true[dataset.rows[place].pair_id] for place in curve.asked])
        margins["oracle"] = [of_pair] * len(options.shots)
    outcomes = {name: [curve.outcomes(one) for one in found] for name, found in margins.items()}
    return FewShotCurve(
        fingerprint=fingerprint,
        shots=options.shots,
        **summarised(outcomes),
        abstention=[
            abstention_curve(one) for one in outcomes.get("attenuated", outcomes["adapted"])
        ],
        users=options.users,
        elicitation=options.elicitation,
        n_users=len(trials[0]),
        n_draws=options.draws,
        left_out=left_out,
    )


class FewShotTrials:
    """Fits the user of every trial and computes their margins; trials are numbered by draw, then user.

    Args:
        row_tokenizer: if it puts pairs in front of prompts, these are exactly the pairs given.

    Raises:
        ValueError: a pair is both given and asked.
    """

    def __init__(
        self,
        model: PersonalModule,
        dataset: PairDataset,
        trials: Sequence[Sequence[Trial]],
        *,
        batch_size: int,
        row_tokenizer: RowTokenizer | None = None,
    ) -> None:
        check_trials(trials, dataset.rows)
        self.model, self.dataset, self.batch_size = model, dataset, batch_size
        self.in_context: InContextTokenizer | None = None
        if isinstance(row_tokenizer, InContextTokenizer):
            self.in_context = row_tokenizer
        self.trials = [trial for of_draw in trials for trial in of_draw]
        self.n_trials = len(self.trials)
        self.asked = [place for trial in self.trials for place in trial.asked]
        self.n_users = n_users = len(trials[0])
        self.own, self.others = [], []
        for number, trial in enumerate(self.trials):
            draw, user = divmod(number, n_users)
            # Somebody else, in another draw another one.
            other = draw * n_users + (user + 1 + draw % (n_users - 1)) % n_users
            self.own += [number] * len(trial.asked)
            self.others += [other] * len(trial.asked)

    @property
    def features(self) -> Tensor:
        """What is known of the user of each trial, encoded, [N, F]."""
        return self.dataset.features[[trial.asked[0] for trial in self.trials]]

    def given(self, number: int, k: int) -> list[int]:
        """Return the indices of the first k pairs given in a trial."""
        return self.trials[number].given[:k]

    def pooled(self, number: int, k: int) -> list[int]:
        """Return the indices of k pairs of other users in the same draw, one pair of each in turn.

        With fewer than k other users, each gives several pairs, none of them twice.
        """
        draw, user = divmod(number, self.n_users)
        n_others = self.n_users - 1
        others = [draw * self.n_users + (user + 1 + n) % self.n_users for n in range(n_others)]
        return [self.trials[others[n % n_others]].given[n // n_others] for n in range(k)]

    def fit(self, rule: Adaptation, k: int, *, pooled: bool = False) -> AdaptedUsers:
        """Fit the user of every trial to k pairs: their own, or with `pooled` those of other users."""
        pairs_of = self.pooled if pooled else self.given
        given = [pairs_of(number, k) for number in range(self.n_trials)]
        features = self.features
        if pooled:  # nothing is known of who gave them together
            features = torch.full_like(features, torch.nan)
        return self.fit_to(rule, given, features)

    def fit_to(
        self, rule: Adaptation, given: Sequence[Sequence[int]], features: Tensor
    ) -> AdaptedUsers:
        """Fit the user of every trial to the pairs with these indices; `features` as in `rule.fit`."""
        places = [place for of_trial in given for place in of_trial]
        owners = [number for number, of_trial in enumerate(given) for _ in of_trial]
        batches = batches_of(self.dataset, places, owners, batch_size=self.batch_size)
        users = rule.fit(self.model, batches, n_users=self.n_trials, features=features)
        if self.in_context is None:
            return users
        pairs = [[self.dataset.rows[place] for place in of_trial] for of_trial in given]
        return replace(users, own_pairs=pairs)

    def margins(
        self, users: AdaptedUsers, owners: Sequence[int], *, attenuated: bool = False
    ) -> np.ndarray:
        """Compute the margins [N] of all pairs asked, each for the user in `owners`.

        Args:
            attenuated: shrink them, see `attenuated_margins`.
        """

        def of_batch(batch: PreferenceBatch) -> Tensor:
            if attenuated:
                return attenuated_margins(self.model, batch, users)
            return score_pairs(self.model, batch, users.vectors)[0]

        dataset, places = self._asked_of(users, owners)
        batches = batches_of(dataset, places, owners, batch_size=self.batch_size)
        with torch.no_grad():
            found = compute_per_pair(of_batch, batches, users.vectors.device)
        return found.double().numpy()

    def _asked_of(
        self, users: AdaptedUsers, owners: Sequence[int]
    ) -> tuple[PairDataset, Sequence[int]]:
        """Return a dataset with the pairs asked, and their indices in it.

        Own pairs of the users in `owners` are put in front of the prompts, if there are any.
        """
        if self.in_context is None or users.own_pairs is None:
            return self.dataset, self.asked
        rows = [
            self.in_context.with_pairs(self.dataset.rows[place], users.own_pairs[owner])
            for place, owner in zip(self.asked, owners, strict=True)
        ]
        whole = self.in_context.whole
        return dataset_of(self.model, whole, rows, batch_size=self.batch_size), range(len(rows))

    def outcomes(self, margins: np.ndarray) -> Outcomes:
        """Return margins [N] of the pairs asked as `Outcomes`; a pair asked in two draws counts twice."""
        users = [self.dataset.rows[place].user_id for place in self.asked]
        return Outcomes(
            pair_id=np.arange(len(margins)),
            user_id=np.array(users, dtype=object),  # a long id must not widen all others
            margin=margins,
            correct=correctness(margins),
        )


def summarised(outcomes: Mapping[str, Sequence[Outcomes]]) -> dict[str, Any]:
    """Estimate the curves, and their differences from the generic user and the oracle, for each shot."""
    name, sizes = "accuracy_micro", ("nll", "ece")
    summaries = {
        who: [summarise_outcomes(one, names=(name, *sizes)) for one in found]
        for who, found in outcomes.items()
    }

    def by_shots(statistic: str) -> dict[str, list[Estimate]]:
        return {who: [one[statistic] for one in found] for who, found in summaries.items()}

    curves = {who: found for who, found in by_shots(name).items() if who != "attenuated"}
    generic, oracle = outcomes["generic"], outcomes.get("oracle")
    fitted = {who: outcomes[who] for who in FITTED if who in outcomes}
    over = {
        who: [paired_difference(a, g)[name] for a, g in zip(found, generic, strict=True)]
        for who, found in fitted.items()
    }
    recovered = None
    if oracle is not None:
        recovered = {
            who: [gain_recovered(*three) for three in zip(found, generic, oracle, strict=True)]
            for who, found in fitted.items()
        }
    return {
        "curves": {**curves, "oracle": curves.get("oracle")},
        **{statistic: by_shots(statistic) for statistic in sizes},
        "over_generic": over,
        "gain_recovered": recovered,
    }
