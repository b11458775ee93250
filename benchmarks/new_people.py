"""How few pairs tell who a new user is, if they are chosen; and what is lost on strangers.

    python benchmarks/new_people.py elicitation RUN...     # 10 chosen pairs against 16 random ones
    python benchmarks/new_people.py strangers RUN...       # `Mixture` against `Posterior` and nobody
    python benchmarks/new_people.py strangers --ask information RUN...  # with chosen pairs

Each RUN is a run of another seed of one world with unseen users; their users are pooled. With --pairs and
--people the users of a simulated world are drawn anew, so many and with so many pairs each, of which half
are given or candidates and the others predicted. With --users seen train users are treated as new.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from plrhf.cli.config import RunConfig
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

SHOTS = (1, 2, 4, 8, 10, 12, 16)


def trials_of(run: str, given: argparse.Namespace) -> FewShotTrials:
    """Draw trials of the run's unseen users, or of `people` new ones with `pairs` pairs each."""
    settings: Any = {"run": run, "runs": None, "out": None, "data": None, "seed": None}
    if given.pairs is not None:
        data = RunConfig.of_run(Path(run)).data
        world = {"test_pairs_per_user": given.pairs, "n_unseen_users": given.people}
        few = {"pairs_per_user": 1, "val_pairs_per_user": 1}  # of train users, which are not needed
        settings["data"] = data.model_copy(update={"source": {**data.source, **world, **few}})
    settings |= {"cache_dir": ".cache/plrhf", "trust_components": False, "debug": False}
    config = EvalConfig.model_construct(**settings)
    model, rows, _, _ = load_run(Path(run), config)
    may_be_given, asked = rows_of_users(rows, given.users)
    tokenizer = row_tokenizer(rows.row_tokenizer.tokenizer, rows.tokenizer_options)
    dataset = dataset_of(model, tokenizer, [*may_be_given, *asked], batch_size=128)
    ids = {row.pair_id for row in may_be_given}
    shots = [one for one in SHOTS if one <= given.most]
    options = FewShotOptions(shots=shots, draws=given.draws, elicitation=given.ask)
    trials, _ = draw_trials(dataset.rows, ids, options, seed=0)
    return FewShotTrials(model, dataset, trials, batch_size=128)


def in_turn(curve: FewShotTrials, rule: Any, most: int) -> FewShotTrials:
    """Let pairs be chosen by a rule, from the same candidates for the same other pairs."""
    trials = ask_in_turn(curve, Mixture(), rule, most, seed=0)
    return FewShotTrials(curve.model, curve.dataset, trials, batch_size=128)


def chosen_pairs(run: str, given: argparse.Namespace) -> Found:
    """Fit users to pairs that each rule chose, and predict the same other pairs."""
    curve = trials_of(run, given)
    found: Found = {}
    for rule in given.rules:
        own = in_turn(curve, rule, given.most)
        for k in (one for one in SHOTS if one <= given.most):
            users = own.fit(Mixture(), k)
            found[rule, k] = own.outcomes(own.margins(users, own.own, attenuated=True))
    return found


def priors(run: str, given: argparse.Namespace) -> Found:
    """Fit users under the learned prior and under the mixture."""
    curve = trials_of(run, given)
    if given.ask != "random":
        curve = in_turn(curve, given.ask, given.most)
    found: Found = {}
    nobody = AdaptedUsers(vectors=curve.model.encoder.generic(curve.n_trials).detach())
    generic = curve.outcomes(curve.margins(nobody, curve.own))
    for k in (one for one in SHOTS if one <= given.most):
        found["generic", k] = generic
        for name, rule in (("learned prior", Posterior(laplace=True)), ("mixture", Mixture())):
            users = curve.fit(rule, k)
            margins = curve.margins(users, curve.own, attenuated=True)
            found[name, k] = curve.outcomes(margins)
            if users.shares is not None:
                share = users.shares[:, 1].mean().item()
                print(f"{run}, {k} pairs: mean probability of a stranger {share:.2f}")
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
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--most", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=None)
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--users", choices=("unseen", "seen"), default="unseen")
    parser.add_argument("--ask", choices=RULES, default=None)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["random", "information"])
    given = parser.parse_args()
    if given.ask is None:
        given.ask = "random" if given.what == "strangers" else "information"
    measure = chosen_pairs if given.what == "elicitation" else priors
    found = pooled(given.runs, partial(measure, given=given))
    for (name, k), outcomes in found.items():
        cell = summarise_outcomes(outcomes, names=("accuracy_micro", "nll", "ece"))
        values = ", ".join(
            f"{what} {shown(cell[what])}" for what in ("accuracy_micro", "nll", "ece")
        )
        print(f"{name}, {k} pairs: {values}")
    if given.what == "elicitation":
        for k, n in ((8, 10), (8, 12), (10, 12), (10, 16), (12, 16)):
            less = paired_difference(found["information", k], found["random", n])
            print(f"information {k} - random {n}, points: {shown(less['accuracy_micro'], 100)}")
        return
    for (name, k), outcomes in found.items():
        for against in ("generic", "learned prior"):
            if name not in ("generic", against):
                apart = paired_difference(outcomes, found[against, k], names=("nll",))
                print(f"nll of {name} - {against}, {k} pairs: {shown(apart['nll'])}")


if __name__ == "__main__":
    main()
