"""Runs that differ in seed alone as one run over the pairs of all seeds, and which encoder wins.

Intervals are over the users of all seeds: they say how a figure would move with other users. What
the seed itself does to it stands beside it, one value a seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pandas as pd

from plrhf.core.stats import Estimate, paired_difference, same_pairs
from plrhf.evaluation.metrics import USER_KINDS, summarise
from plrhf.reporting.comparison import (
    BESIDE_THE_DATA,
    NO_ESTIMATE,
    columns_of,
    comparison_frame,
    estimate_in,
    p_cell,
    with_holm,
)
from plrhf.reporting.curves import curves, flattened
from plrhf.reporting.runs import Run
from plrhf.reporting.tables import Cell, Table, estimate_cell, percent, points

SEEDS_NOTE = (
    "Runs that differ in seed alone are one row: accuracy over the test pairs of all seeds in user "
    "context, in brackets 95% intervals over the users of all seeds; by seed: each one's own. Over "
    "baseline, p (Holm, over this table) and gain are as for single runs; over next best: less the "
    "accuracy of the best other encoder with the same aggregator on the same pairs, paired, in points."
)
OF_ENCODER = ("encoder", "aggregator")
SWAPPED = {"chosen_tokens": "rejected_tokens", "rejected_tokens": "chosen_tokens"}


def over_seeds(runs: Sequence[Run]) -> list[Run]:
    """One run for all that differ in seed alone, in order of appearance; a repeated seed counts once."""
    groups: dict[Any, dict[str, Run]] = {}
    for run in runs:
        settings = flattened(run.results["config"])
        key = tuple((name, settings[name]) for name in sorted(settings))
        groups.setdefault(key, {}).setdefault(run.settings["seed"], run)
    return [
        _pooled([group[seed] for seed in sorted(group, key=lambda seed: (len(seed), seed))])
        for group in groups.values()
    ]


def base_values(runs: Sequence[Run]) -> dict[str, Any]:
    """Of each number that makes a curve, the value that most runs have."""
    flat = [flattened(run.results["config"]) for run in runs]
    return {
        axis: Counter(one[axis] for one in flat if axis in one).most_common(1)[0][0]
        for axis in curves(runs)
    }


def seeds_note(base: Mapping[str, Any]) -> str:
    """What the table shows, and at which of `base_values`."""
    at = ", ".join(f"{axis}={value}" for axis, value in base.items())
    return f"{SEEDS_NOTE} At {at}; other values are in the curves." if at else SEEDS_NOTE


def at_base(runs: Sequence[Run], base: Mapping[str, Any]) -> list[Run]:
    """The runs that have all of `base_values`."""
    flat = [flattened(run.results["config"]) for run in runs]
    return [
        run
        for run, settings in zip(runs, flat, strict=True)
        if all(settings.get(axis, value) == value for axis, value in base.items())
    ]


def seeds_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """`comparison_frame` of each set of test pairs, one under the other, and who comes next.

    Beside its columns there are ``tests`` (settings of the data that tell sets apart, and seeds),
    ``others`` (what tells rows of the same encoder and aggregator apart), and for each kind of user
    ``_by_seed`` (accuracy of each seed) and ``_over_next`` (less the best other encoder).
    """
    sets: list[list[Run]] = []
    for run in runs:
        for one in sets:
            if all(same_pairs(run.outcomes(kind), one[0].outcomes(kind)) for kind in USER_KINDS):
                one.append(run)
                break
        else:
            sets.append([run])
    titles = _titles([one[0] for one in sets])
    frames = [_one_set(one).assign(tests=title) for one, title in zip(sets, titles, strict=True)]
    return with_holm(pd.concat(frames, ignore_index=True))


def seeds_table(frame: pd.DataFrame) -> Table:
    """The frame in groups by kind of user and test pairs, best encoder of each aggregator first."""
    varied = [key for key in OF_ENCODER if frame[key].nunique() > 1]
    varied += ["others"] * bool((frame["others"].fillna("") != "").any())
    groups = []
    for kind in USER_KINDS:
        for tests, part in frame[frame[f"{kind}_n_pairs"] > 0].groupby("tests", sort=False):
            order = ["aggregator", f"{kind}_accuracy_micro"]
            ranked = part.sort_values(order, ascending=[True, False], kind="stable")
            rows = [_row(row, kind, varied) for _, row in ranked.iterrows()]
            groups.append((f"{kind.capitalize()} users, {tests}", rows))
    measures = ["accuracy, %", "by seed", "over baseline", "over next best", "p", "gain"]
    return Table(["role", *varied, *measures], groups, tuple(range(1 + len(varied))))


def curves_table(runs: Sequence[Run]) -> Table | None:
    """Accuracy at each value of each setting that makes a curve; None where none does."""
    groups = []
    for setting, families in curves(runs).items():
        points_of = [(value, run, family) for family in families for value, run in family.runs]
        rows = [
            [
                Cell(family.name),
                Cell(f"{value:g}"),
                *_of_contexts(run),
                points(_over_next(run, [one for at, one, _ in points_of if at == value], "seen")),
            ]
            for value, run, family in points_of
        ]
        groups.append((setting, rows))
    columns = ["runs", "value", "seen users, %", "without the user, %", "unseen users, %"]
    columns.append("over next best, seen users")
    return Table(columns, groups, (0,)) if len(groups) > 0 else None


def _of_contexts(run: Run) -> list[Cell]:
    cells = [run.results["test"][kind] for kind in USER_KINDS]
    shown = [cells[0]["user"], cells[0]["generic"], cells[1]["user"]]
    return [percent(cell["accuracy_micro"]) for cell in shown]


def _row(row: pd.Series, kind: str, varied: Sequence[str]) -> list[Cell]:
    by_seed = row[f"{kind}_by_seed"]
    return [
        Cell(str(row["role"])),
        *(Cell("" if pd.isna(row[key]) else str(row[key])) for key in varied),
        percent(estimate_in(row, f"{kind}_accuracy_micro")),
        Cell("–" if pd.isna(by_seed) else by_seed),
        points(estimate_in(row, f"{kind}_difference_micro")),
        points(estimate_in(row, f"{kind}_over_next")),
        p_cell(row[f"{kind}_p_holm"]),
        estimate_cell(estimate_in(row, f"{kind}_gain_recovered"), "z.2f"),
    ]


def _one_set(runs: Sequence[Run]) -> pd.DataFrame:
    """The frame of runs on the same test pairs."""
    frame = comparison_frame(runs)
    labels = _others(runs)
    rows = []
    for place in range(len(frame)):
        run = runs[place] if place < len(runs) else None  # else the oracle, the length rule
        row: dict[str, Any] = {"others": None if run is None else labels[place]}
        for kind in USER_KINDS:
            by_seed = None if run is None else run.results.get("by_seed")
            row[f"{kind}_by_seed"] = None if by_seed is None else by_seed[kind]
            over = NO_ESTIMATE if run is None else _over_next(run, runs, kind)
            row |= columns_of(f"{kind}_over_next", over)
        rows.append(row)
    return pd.concat([frame, pd.DataFrame(rows)], axis=1)


def _over_next(run: Run, runs: Sequence[Run], kind: str) -> Estimate:
    """Accuracy less that of the best other encoder with the same aggregator and model."""

    def accuracy(other: Run) -> float:
        return float(other.results["test"][kind]["user"]["accuracy_micro"]["value"])

    alike = ("model", "aggregator")
    others = [
        other
        for other in runs
        if other.settings["encoder"] != run.settings["encoder"]
        and all(other.settings[key] == run.settings[key] for key in alike)
        and same_pairs(other.outcomes(kind), run.outcomes(kind))
    ]
    if len(others) == 0 or len(run.outcomes(kind)) == 0:
        return NO_ESTIMATE
    best = max(others, key=accuracy)
    return paired_difference(run.outcomes(kind), best.outcomes(kind))["accuracy_micro"]


def _titles(first: Sequence[Run]) -> list[str]:
    """What tells sets of test pairs apart: settings of the data in which their runs differ."""
    flat = [flattened(run.results["config"]["data"], "data.") for run in first]
    names = [
        name
        for name in dict.fromkeys(name for settings in flat for name in settings)
        if name.removeprefix("data.") not in BESIDE_THE_DATA
        and len({settings.get(name) for settings in flat}) > 1
    ]
    return [
        ", ".join([f"{name}={settings.get(name)}" for name in names] + [_seeds(run)])
        for run, settings in zip(first, flat, strict=True)
    ]


def _seeds(run: Run) -> str:
    seeds = run.settings["seed"]
    return f"seeds {seeds}" if "," in seeds else f"seed {seeds}"


def _others(runs: Sequence[Run]) -> list[str]:
    """Of each run the settings that tell it from others of its role, encoder and aggregator."""
    flat = [flattened(run.results["config"]) for run in runs]
    kinds = [(run.role, *(run.settings[key] for key in OF_ENCODER)) for run in runs]
    labels = []
    for kind, settings in zip(kinds, flat, strict=True):
        alike = [other for other, its in zip(flat, kinds, strict=True) if its == kind]
        varied = [name for name in settings if len({one.get(name) for one in alike}) > 1]
        labels.append(", ".join(f"{name}={settings[name]}" for name in varied))
    return labels


def _pooled(runs: Sequence[Run]) -> Run:
    """Runs of different seeds as one; where these share no pair, their users are different people."""
    first = runs[0]
    if len(runs) == 1:
        return first
    pairs = [set(run.predictions["pair_id"]) for run in runs]
    strangers = all(one.isdisjoint(other) for one, other in combinations(pairs, 2))
    tables, rules = [], []
    for run in runs:
        seed, table = run.settings["seed"], run.predictions
        rules.append(run.results["controls"]["length_only"]["rule"])
        ids = {"pair_id": f"{seed}/" + table["pair_id"].astype(str)}
        ids |= {"user_id": f"{seed}/" + table["user_id"].astype(str)} if strangers else {}
        table = table.assign(**ids)
        if "shorter" in rules[-1]:  # each seed goes by the rule of its own val pairs
            table = table.rename(columns=SWAPPED)
        tables.append(table)
    predictions = pd.concat(tables, ignore_index=True)
    summary = summarise(predictions, longer_wins=True)
    summary["controls"]["length_only"]["rule"] = ", ".join(dict.fromkeys(rules))
    seeds = ", ".join(run.settings["seed"] for run in runs)
    config = first.results["config"]
    config = {**config, "seed": seeds, "data": {**config["data"], "seed": seeds}}
    by_seed = {kind: _by_seed(runs, kind) for kind in USER_KINDS}
    results = {**first.results, **summary, "config": config, "by_seed": by_seed}
    name = f"{first.name} and {len(runs) - 1} more"
    return replace(first, name=name, results=results, predictions=predictions)


def _by_seed(runs: Sequence[Run], kind: str) -> str:
    values = [run.results["test"][kind]["user"]["accuracy_micro"]["value"] for run in runs]
    return ", ".join("–" if value is None else f"{100 * value:.1f}" for value in values)
