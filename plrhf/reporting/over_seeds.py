"""Pools runs that differ in seed alone, and compares encoders over all seeds.

Intervals come from a bootstrap over the users of all seeds. They do not cover the choice of seeds;
tables therefore show the value of every seed as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from plrhf.core.bootstrap import Estimate
from plrhf.core.stats import paired_difference
from plrhf.evaluation.metrics import USER_KINDS, UserKind, summarise
from plrhf.reporting.comparison import (
    BESIDE_THE_DATA,
    NO_ESTIMATE,
    OF_ENCODER,
    columns_of,
    estimate_in,
    nearest_baseline,
    other_settings,
    p_cell,
    reference_rows,
    run_row,
    with_holm,
)
from plrhf.reporting.curves import curves, flattened
from plrhf.reporting.runs import Run
from plrhf.reporting.tables import Cell, Table, estimate_cell, percent, points

NOTE = (
    "Runs that differ in seed alone are one row: accuracy over the test pairs of all seeds in user "
    "context, in brackets 95% intervals over the users of all seeds; by seed: each one's own. Over "
    "baseline, p (Holm, over this table) and gain are as for single runs; over next best: less the "
    "accuracy of the other encoder with the same aggregator and settings that is best on val, on the "
    "same test pairs, paired, in points. A difference is over the seeds that both have."
)
SWAPPED = {"chosen_tokens": "rejected_tokens", "rejected_tokens": "chosen_tokens"}


def over_seeds(runs: Sequence[Run]) -> list[Run]:
    """Pool all runs that differ in seed alone, in order of first appearance.

    Of two runs with the same settings and seed, only the first is used.
    """
    groups: dict[Any, dict[str, Run]] = {}
    for run in runs:
        settings = flattened(run.config)
        key = tuple((name, settings[name]) for name in sorted(settings))
        groups.setdefault(key, {}).setdefault(run.settings["seed"], run)
    return [
        pooled([group[seed] for seed in sorted(group, key=lambda seed: (len(seed), seed))])
        for group in groups.values()
    ]


def pooled(runs: Sequence[Run]) -> Run:
    """Join runs of different seeds into one run with the pairs of all seeds.

    A user id stands for the same person in every seed, so this person counts once. Synthetic users
    are the exception: the users of another seed are other people, though they have the same ids.
    """
    first = runs[0]
    if len(runs) == 1:
        return first
    tables, rules = [], []
    for run in runs:
        table, provenance = run.predictions, run.results.provenance
        ids = {"pair_id": f"{run.settings['seed']}/" + table["pair_id"].astype(str)}
        if provenance is not None and provenance.world is not None:
            ids["user_id"] = f"{provenance.world}/" + table["user_id"].astype(str)
        table = table.assign(**ids)
        rules.append(run.results.controls["length_only"]["rule"])
        if "shorter" in rules[-1]:  # each seed goes by the rule of its own val pairs
            table = table.rename(columns=SWAPPED)
        tables.append(table)
    predictions = pd.concat(tables, ignore_index=True)
    summary = summarise(predictions, longer_wins=True)
    summary["controls"]["length_only"]["rule"] = ", ".join(dict.fromkeys(rules))
    seeds = ", ".join(run.settings["seed"] for run in runs)
    config = {**first.config, "seed": seeds, "data": {**first.config["data"], "seed": seeds}}
    results = first.results.model_copy(update={**summary, "config": config, "provenance": None})
    name = f"{first.name} and {len(runs) - 1} more"
    return replace(first, name=name, results=results, predictions=predictions, of_seeds=tuple(runs))


def on_shared_seeds(first: Run, second: Run) -> tuple[Run, Run] | None:
    """Reduce two runs to the seeds in which they have the same test pairs; None without any."""
    theirs = {run.settings["seed"]: run for run in second.singles}
    shared = [
        (run, theirs[seed])
        for run in first.singles
        if (seed := run.settings["seed"]) in theirs and run.tested_as(theirs[seed])
    ]
    if len(shared) == 0:
        return None
    ours, others = zip(*shared, strict=True)
    return (
        first if len(ours) == len(first.singles) else pooled(ours),
        second if len(others) == len(second.singles) else pooled(others),
    )


def seeds_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a table with one row for each run of `over_seeds`, like `comparison_frame`.

    Further columns are ``tests`` (the seeds, and the settings of the data that differ between sets
    of test pairs), ``others`` (the settings that differ between runs of the same encoder and
    aggregator), ``missing`` (a sentence on seeds that a difference leaves out), and for each kind of
    user ``_by_seed`` (accuracy of each seed, as text) and ``_over_next`` (see `over_next`).
    """
    sets = same_tests(runs)
    most = [max(one, key=lambda run: len(run.singles)) for one in sets]  # with all their seeds
    titles = _titles(most)
    axes = list(curves(runs))
    frames = []
    for one, whole, title in zip(sets, most, titles, strict=True):
        rows = _rows_of_set(one, axes)
        rows += [{**row, "tests": title} for row in reference_rows(whole)]
        frames.append(pd.DataFrame(rows).assign(tests=title))
    return with_holm(pd.concat(frames, ignore_index=True))


def seeds_note(frame: pd.DataFrame) -> str:
    """Return the note below the table: what it shows, and which seeds its differences leave out."""
    missing = [str(words) for words in frame["missing"].dropna() if words != ""]
    return " ".join([NOTE, *missing])


def seeds_table(frame: pd.DataFrame) -> Table:
    """Return the frame as a table, grouped by kind of user and test pairs.

    Within a group, rows are sorted by aggregator and then by accuracy, the best first.
    """
    varied = [key for key in OF_ENCODER if frame[key].nunique() > 1]
    varied += ["others"] * bool((frame["others"].fillna("") != "").any())
    groups = []
    for kind in USER_KINDS:
        for tests, part in frame[frame[f"{kind}_n_pairs"] > 0].groupby("tests", sort=False):
            order = ["aggregator", f"{kind}_accuracy_micro"]
            ranked = part.sort_values(order, ascending=[True, False], kind="stable")
            rows = [_table_row(row, kind, varied) for _, row in ranked.iterrows()]
            groups.append((f"{kind.capitalize()} users, {tests}", rows))
    measures = ["accuracy, %", "by seed", "over baseline", "over next best", "p", "gain"]
    return Table(["role", *varied, *measures], groups, tuple(range(1 + len(varied))))


def curves_table(runs: Sequence[Run]) -> Table | None:
    """Return a table of the accuracy at each value of each varied setting; None without any."""
    groups = []
    for setting, families in curves(runs).items():
        points_of = [(value, run, family) for family in families for value, run in family.runs]
        rows = [
            [
                Cell(family.name),
                Cell(f"{value:g}"),
                *_context_cells(run),
                points(over_next(run, [one for at, one, _ in points_of if at == value], "seen")),
            ]
            for value, run, family in points_of
        ]
        groups.append((setting, rows))
    columns = ["runs", "value", "seen users, %", "without the user, %", "unseen users, %"]
    columns.append("over next best, seen users")
    return Table(columns, groups, (0,)) if len(groups) > 0 else None


def over_next(run: Run, runs: Sequence[Run], kind: str) -> Estimate:
    """Estimate the lead over the best other encoder with the same aggregator and model.

    The best is chosen by accuracy on val, since the best on test would be favoured by chance. There
    is no estimate without val pairs.
    """
    candidates = [
        (accuracy, other)
        for other in runs
        if other.settings["encoder"] != run.settings["encoder"]
        and all(other.settings[key] == run.settings[key] for key in ("model", "aggregator"))
        and (accuracy := other.val_accuracy) is not None
        and on_shared_seeds(run, other) is not None
    ]
    if len(candidates) == 0 or len(run.outcomes(kind)) == 0:
        return NO_ESTIMATE
    _, best = max(candidates, key=lambda one: one[0])
    both = on_shared_seeds(run, best)
    assert both is not None
    ours, theirs = (one.outcomes(kind) for one in both)
    return paired_difference(ours, theirs)["accuracy_micro"] if len(ours) > 0 else NO_ESTIMATE


def same_tests(runs: Sequence[Run]) -> list[list[Run]]:
    """Divide runs into sets whose members share test pairs in at least one seed."""
    sets: list[list[Run]] = []
    for run in runs:
        for one in sets:
            if any(on_shared_seeds(run, other) is not None for other in one):
                one.append(run)
                break
        else:
            sets.append([run])
    return sets


def _rows_of_set(runs: Sequence[Run], axes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the table rows of runs that share test pairs.

    Args:
        axes: the varied settings, see `curves`. A run is compared with the next best encoder among
            the runs that have its values of them.
    """
    rows = []
    flat = [flattened(run.config) for run in runs]
    for run, settings, label in zip(runs, flat, other_settings(runs), strict=True):
        alike = [
            other
            for other, its in zip(runs, flat, strict=True)
            if all(its[axis] == settings[axis] for axis in axes if axis in its and axis in settings)
        ]
        row, missing = _paired_row(run, runs)
        for kind in USER_KINDS:
            row[f"{kind}_by_seed"] = _by_seed(run, kind)
            row |= columns_of(f"{kind}_over_next", over_next(run, alike, kind))
        rows.append({**row, "others": label, "missing": missing})
    return rows


def _paired_row(run: Run, runs: Sequence[Run]) -> tuple[dict[str, Any], str]:
    """Return a run's table row, paired with its baseline on the seeds that both have.

    The text names the seeds that are left out; it is empty if there are none.
    """
    shared = [(one, on_shared_seeds(run, one)) for one in runs]
    there = [(one, both[0]) for one, both in shared if both is not None]
    there.sort(key=lambda one: len(one[1].singles), reverse=True)  # most seeds first
    found = nearest_baseline(run, [one for one, _ in there])
    if found is None:
        return run_row(run, None), ""
    both = on_shared_seeds(run, found)
    assert both is not None
    ours, theirs = both
    row = run_row(run, theirs, paired_on=ours)
    row["baseline"] = found.name
    seeds = [{one.settings["seed"] for one in some.singles} for some in (run, found, ours)]
    left_out = sorted((seeds[0] | seeds[1]) - seeds[2], key=lambda seed: (len(seed), seed))
    if len(left_out) == 0:
        return row, ""
    return row, f"{run.name} and {found.name} are not compared in seed {', '.join(left_out)}."


def _context_cells(run: Run) -> list[Cell]:
    """Format the accuracy of seen users, of seen users as the generic user, and of unseen users."""
    seen, unseen = (run.results.test[kind] for kind in USER_KINDS)
    shown = [seen["user"], seen["generic"], unseen["user"]]
    return [percent(cell["accuracy_micro"]) for cell in shown]


def _table_row(row: pd.Series, kind: str, varied: Sequence[str]) -> list[Cell]:
    """Format a row of the frame for one kind of user, with the columns named in `varied`."""
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


def _titles(first: Sequence[Run]) -> list[str]:
    """Return a title for each set of test pairs: the settings of the data that differ, and seeds.

    Args:
        first: one run of each set.
    """
    flat = [flattened(run.config["data"], "data.") for run in first]
    names = [
        name
        for name in dict.fromkeys(name for settings in flat for name in settings)
        if name.removeprefix("data.") not in BESIDE_THE_DATA
        and len({settings.get(name) for settings in flat}) > 1
    ]
    return [
        ", ".join([f"{name}={settings.get(name)}" for name in names] + [seeds_of(run)])
        for run, settings in zip(first, flat, strict=True)
    ]


def seeds_of(run: Run) -> str:
    """Name the seeds of a run."""
    seeds = run.settings["seed"]
    return f"seeds {seeds}" if "," in seeds else f"seed {seeds}"


def _by_seed(run: Run, kind: UserKind) -> str | None:
    """Format the accuracy of each seed, separated by commas; None for a single run."""
    if len(run.of_seeds) == 0:
        return None
    cells = [one.results.test[kind]["user"]["accuracy_micro"] for one in run.of_seeds]
    values = [cell["value"] for cell in cells]
    return ", ".join("–" if value is None else f"{100 * value:.1f}" for value in values)
