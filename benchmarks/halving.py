"""Whether stopping the worse half of trials early changes which one is chosen, and what it saves.

python benchmarks/halving.py --path DIR                                            # Polis, ten methods
python benchmarks/halving.py --path DIR --rows referee/llmfao --rules 0.25,0.5 0.5

All trials are trained to the end, and their val scores on the way say who would have stopped, since those
that go on are the same with and without the others. Test pairs are asked of the trials that a rule chooses,
to say what it costs, and change nothing. Steps are those of all trials together.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from plrhf.cli.main import silence_libraries
from plrhf.cli.methods import Method, read_method, started_trial
from plrhf.cli.referee_job import Bench
from plrhf.core.stats import Outcomes, correctness, paired_difference
from plrhf.data.module import PreferenceData
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee import side_by_side
from plrhf.referee.protocol import margins_on
from plrhf.referee.side_by_side import train_groups
from plrhf.referee.stack import Stack, validate

METHODS = "vanilla,lookup,cluster,lore,pref,prlhf,factorisation,text_residual,odd,vpl"


def main() -> None:
    """Print a line for each method and rule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True, help="directory of the backbone")
    parser.add_argument("--rows", default="referee/polis")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--rules", nargs="+", default=["0.25,0.5"], help="of eval.halvings each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=12)
    given = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    bench = Bench((given.rows, given.seed))
    print(
        "| method | rule | steps | trial | val loss | test, % | over no rule, points |", flush=True
    )
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    for name in given.methods.split(","):
        where = [f"backbone.path={given.path}"]
        method = read_method(name, given.rows, where, seed=given.seed, n_trials=given.trials)
        for line in lines(method, bench, ["", *given.rules]):
            print(f"| `{name}` | {line}", flush=True)


def lines(method: Method, bench: Bench, rules: Sequence[str]) -> list[str]:
    """Train a method's trials, and return a line for each rule; the first rule is none."""
    data, backbone, _ = bench.rows_of(method.config)
    data = bench.with_vectors(method, data, backbone)
    backbone = bench.backbone_for(method, data, backbone)
    groups, states = [], []
    for group in method.groups():
        groups.append([started_trial(trial, method, data, backbone) for trial in group])
        states.append(torch.get_rng_state())
    curves, every, total = trained(groups, method, data, states)
    models = [model for group in groups for model in group]
    whole, made = outcomes(models[int(curves.min(axis=0).argmin())], data), []
    for rule in rules:
        shares = [float(share) for share in rule.split(",") if share]
        n_steps = steps_trained(curves, shares, every, total)
        best = np.where(n_steps == total, curves.min(axis=0), np.inf)
        chosen = int(best.argmin())
        asked = outcomes(models[chosen], data)
        gap = paired_difference(asked, whole, names=["accuracy_micro"])["accuracy_micro"]
        low, high = (100 * end for end in gap["ci95"] or (0.0, 0.0))
        made.append(
            f"{rule or 'none'} | {n_steps.sum():,} | {chosen} | {best[chosen]:.4f} | "
            f"{100 * asked.correct.mean():.1f} | "
            f"{100 * (gap['value'] or 0.0):+.1f} [{low:+.1f}, {high:+.1f}] |"
        )
    return made


def trained(
    groups: list[list[PersonalRewardModel]],
    method: Method,
    data: PreferenceData,
    states: list[Tensor],
) -> tuple[np.ndarray, int, int]:
    """Train all trials to the end; return val scores [validations, trials], and both numbers of steps."""
    seen: list[Tensor] = []

    def recorded(stack: Stack, batches: Sequence[object]) -> Tensor:
        found = validate(stack, batches)  # type: ignore[arg-type]
        seen.append(found[:, 0])
        return found

    training = method.training
    side_by_side.validate = recorded
    train_groups(groups, data, training, states)
    n_batches = len(data.restrict_to("train", "val").train_dataloader())
    every = training.val_every_n_steps or n_batches
    n_trials = sum(len(group) for group in groups)
    return torch.cat(seen).view(-1, n_trials).numpy(), every, training.total_steps(n_batches)


def steps_trained(
    curves: np.ndarray, shares: Sequence[float], every: int, total: int
) -> np.ndarray:
    """Return how many steps each trial would have been trained for, [T]; see `side_by_side.halve`."""
    n_steps = np.full(curves.shape[1], total)
    for n in sorted({math.ceil(share * total / every) for share in shares}):
        racing = n_steps == total
        if 0 < n * every < total:
            best = np.where(racing, curves[:n].min(axis=0), np.inf)
            stopped = best.argsort(kind="stable")[math.ceil(racing.sum() / 2) :]
            n_steps[np.intersect1d(stopped, np.flatnonzero(racing))] = n * every
    return n_steps


def outcomes(model: PersonalRewardModel, data: PreferenceData) -> Outcomes:
    """Return what a model says of test pairs of seen users."""
    test, seen = data.datasets["test"], set(data.splits.users)
    kept = np.array([row.user_id in seen for row in test.rows])
    margin = margins_on(model, test, batch_size=8192)[kept, 0]
    rows = [row for row, of_seen in zip(test.rows, kept, strict=True) if of_seen]
    pairs = np.array([row.pair_id for row in rows])
    users = np.array([row.user_id for row in rows])
    return Outcomes(pairs, users, margin, correctness(margin))


if __name__ == "__main__":
    main()
