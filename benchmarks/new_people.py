"""How few pairs tell who a new user is, if they are chosen; and what is lost on strangers.

    python benchmarks/new_people.py elicitation RUN...     # 10 chosen pairs against 16 random ones
    python benchmarks/new_people.py strangers RUN...       # the mixture of priors against the learned prior

Each RUN is a run of another seed of one world with unseen users; their users are pooled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plrhf.cli.eval_config import EvalConfig
from plrhf.cli.tasks import load_run
from plrhf.core.stats import Outcomes, paired_difference, summarise_outcomes
from plrhf.data.in_context import row_tokenizer
from plrhf.evaluation.ask_in_turn import ask_in_turn
from plrhf.evaluation.elicitation import RULES
from plrhf.evaluation.few_shot import FewShotTrials
from plrhf.evaluation.trials import FewShotOptions, draw_trials, rows_of_users
from plrhf.models.adaptation import AdaptedUsers, Mixture, Posterior
from plrhf.models.pair_batches import dataset_of

Found = dict[tuple[str, int], Outcomes]
"""Outcomes on the pairs asked, by whose or what rule, and number of pairs given."""


def trials_of(run: str, options: FewShotOptions) -> FewShotTrials:
    """Draw trials of the run's unseen users."""
    settings: Any = {"run": run, "runs": None, "out": None, "data": None, "seed": None}
    config = EvalConfig.model_construct(**settings, trust_components=False, debug=False)
    model, data, _, _ = load_run(Path(run), config)
    given, asked = rows_of_users(data, options.users)
    tokenizer = row_tokenizer(data.row_tokenizer.tokenizer, data.tokenizer_options)
    dataset = dataset_of(model, tokenizer, [*given, *asked], batch_size=128)
    ids = {row.pair_id for row in given}
    trials, _ = draw_trials(dataset.rows, ids, options, seed=0)
    return FewShotTrials(model, dataset, trials, batch_size=128)


def chosen_pairs(run: str, draws: int, most: int) -> Found:
    """Fit users to pairs that each rule chose, and predict the same other pairs."""
    options = FewShotOptions(shots=[most], draws=draws, elicitation="information")
    found: Found = {}
    curve = trials_of(run, options)
    for rule in RULES:
        trials = ask_in_turn(curve, Posterior(laplace=True), rule, most, seed=0)
        own = FewShotTrials(curve.model, curve.dataset, trials, batch_size=128)
        for k in (2, 4, 6, 8, 10, 12, 16):
            users = own.fit(Posterior(laplace=True), k)
            found[rule, k] = own.outcomes(own.margins(users, own.own, attenuated=True))
    return found


def priors(run: str, draws: int, most: int) -> Found:
    """Fit users to random pairs under the learned prior and under the mixture."""
    curve, found = trials_of(run, FewShotOptions(shots=[most], draws=draws)), {}
    nobody = AdaptedUsers(vectors=curve.model.encoder.generic(curve.n_trials).detach())
    generic = curve.outcomes(curve.margins(nobody, curve.own))
    for k in (1, 2, 4, 8, 16):
        found["generic", k] = generic
        for name, rule in (("learned prior", Posterior(laplace=True)), ("mixture", Mixture())):
            users = curve.fit(rule, k)
            margins = curve.margins(users, curve.own, attenuated=True)
            found[name, k] = curve.outcomes(margins)
            if users.shares is not None:
                shares = ", ".join(f"{one:.2f}" for one in users.shares.mean(dim=0).tolist())
                print(f"{run}, {k} pairs: mean probability of each prior {shares}")
    return found


def pooled(runs: Sequence[str], measure: Callable[[str], Found]) -> Found:
    """Put the outcomes of all runs together; users of two runs are different people."""
    of_runs = [measure(run) for run in runs]
    return {key: joined([one[key] for one in of_runs]) for key in of_runs[0]}


def joined(parts: Sequence[Outcomes]) -> Outcomes:
    users = [[f"{n} {user}" for user in one.user_id] for n, one in enumerate(parts)]
    margins = np.concatenate([one.margin for one in parts])
    return Outcomes(
        pair_id=np.arange(len(margins)),
        user_id=np.concatenate(users),
        margin=margins,
        correct=np.concatenate([one.correct for one in parts]),
    )


def shown(estimate: Any, scale: float = 1.0) -> str:
    low, high = (scale * end for end in estimate["ci95"])
    return f"{scale * estimate['value']:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("elicitation", "strangers"))
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--most", type=int, default=16)
    given = parser.parse_args()
    measure = chosen_pairs if given.what == "elicitation" else priors
    found = pooled(given.runs, lambda run: measure(run, given.draws, given.most))
    for (name, k), outcomes in found.items():
        cell = summarise_outcomes(outcomes, names=("accuracy_micro", "nll", "ece"))
        values = ", ".join(
            f"{what} {shown(cell[what])}" for what in ("accuracy_micro", "nll", "ece")
        )
        print(f"{name}, {k} pairs: {values}")
    if given.what == "elicitation":
        for k in (10, 12):
            less = paired_difference(found["information", k], found["random", 16])
            print(f"information {k} - random 16, points: {shown(less['accuracy_micro'], 100)}")
        return
    for k in (1, 2, 4, 8, 16):
        for one, other in (
            ("mixture", "generic"),
            ("learned prior", "generic"),
            ("mixture", "learned prior"),
        ):
            apart = paired_difference(found[one, k], found[other, k], names=("nll",))
            print(f"nll of {one} - {other}, {k} pairs: {shown(apart['nll'])}")


if __name__ == "__main__":
    main()
