"""Compares runs: one table row for each, with its paired difference from a vanilla run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from plrhf.core.bootstrap import Estimate, holm
from plrhf.core.errors import bad_value
from plrhf.core.stats import PairedTest, gain_recovered, paired_difference, paired_test, same_pairs
from plrhf.evaluation.metrics import USER_KINDS
from plrhf.reporting.curves import flattened
from plrhf.reporting.runs import IN_TEXT, PERSONAL, ROLES, SETTINGS, Run
from plrhf.reporting.tables import (
    Cell,
    Table,
    TerminalTable,
    estimate_cell,
    percent,
    points,
    rich_table,
)

NO_ESTIMATE: Estimate = {"value": None, "ci95": None}
COMPARISON_NOTE = (
    "User context, in brackets 95% intervals over users. Over baseline: accuracy less that of the "
    "baseline (unless one was named, the vanilla run of the same model, data and seed), in points, "
    "paired. Effect: mean over users of that difference, in its standard deviations. p: of no "
    "difference, two-sided, adjusted for all differences of the table (Holm). Gain: share of what "
    "the oracle wins over the baseline; no interval where the oracle's own lead may be 0. Price: nll "
    "of the generic context less the baseline's, in nats. Uniform, shuffled and length only are "
    "controls."
)
BESIDE_THE_DATA = (
    *("shuffle_users", "batch_size", "batch_tokens", "eval_batch_size"),
    *(*IN_TEXT, "min_context_pairs"),
)
"""Settings of the data that change neither rows nor splits. A baseline may differ in them."""
OF_ENCODER = ("encoder", "aggregator")
PARTS = ("data", "backbone", "aggregator", "model", "optim", "trainer")


@dataclass(frozen=True)
class Comparison:
    """The comparison of finished runs.

    Attributes:
        runs: the compared runs.
        frame: what `comparison_frame` returns.
        skipped: directories without results.
        over_seeds: what `over_seeds.seeds_frame` returns; None if no two runs differ in seed alone.
    """

    runs: list[Run]
    frame: pd.DataFrame
    skipped: list[str]
    over_seeds: pd.DataFrame | None


def comparison_frame(runs: Sequence[Run], *, baseline: Run | None = None) -> pd.DataFrame:
    """Return a table with one row for each run, then the oracle and the length rule.

    Oracle and length rule have one row for each set of test pairs. The ends of intervals are in
    columns that end in ``_low`` and ``_high``.

    Args:
        baseline: the run that every run is paired with; None: each is paired with its own vanilla
            run, see `nearest_baseline`.

    Raises:
        ValueError: a run was not tested on the baseline's pairs.
    """
    if baseline is not None:
        for run in runs:
            _check_baseline(run, baseline)
    rows = [
        run_row(run, _baseline_among(runs, run) if baseline is None else baseline) for run in runs
    ]
    for row, label in zip(rows, other_settings(runs), strict=True):
        row["others"] = label
    worlds: dict[tuple[str, ...], Run] = {}  # the first run of each test set
    for run in runs:
        worlds.setdefault(run.test_key, run)
    for world in worlds.values():
        rows += reference_rows(world, f" ({world.name})" if len(worlds) > 1 else "")
    return with_holm(pd.DataFrame(rows))


def other_settings(runs: Sequence[Run]) -> list[str]:
    """Describe for each run the settings that differ among runs of its role and of equal parts.

    Runs of another model, encoder or aggregator are told apart by that, in columns of their own. Where a
    run is personal by its texts alone, it says so.
    """
    flat = [flattened(run.config) for run in runs]
    kinds = [(run.role, *(run.settings[key] for key in ("model", *OF_ENCODER))) for run in runs]
    labels = []
    for kind, settings in zip(kinds, flat, strict=True):
        alike = [other for other, its in zip(flat, kinds, strict=True) if its == kind]
        varied = [name for name in settings if len({one.get(name) for one in alike}) > 1]
        if kind[0] == PERSONAL and settings["encoder._target_"] in ROLES:
            varied += [one for name in IN_TEXT if settings.get(one := f"data.{name}")]
        words = (f"{name}={_as_typed(settings[name])}" for name in dict.fromkeys(varied))
        labels.append(", ".join(words))
    return labels


def _as_typed(value: Any) -> str:
    """Return a setting's value as a command line has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def reference_rows(run: Run, suffix: str = "") -> list[dict[str, Any]]:
    """Return the table rows of the oracle (if known) and the length rule on a run's test pairs."""
    length = run.results.controls["length_only"]
    references: list[tuple[str, str, Mapping[str, Any] | None]] = [
        ("oracle", "oracle", run.results.oracle),
        ("length only", "length", length),
    ]
    return [
        {"run": f"{name}{suffix}", "role": role, **_accuracy_columns(cells)}
        for name, role, cells in references
        if cells is not None
    ]


def _check_baseline(run: Run, baseline: Run) -> None:
    """Raise unless both runs were tested on the same pairs, with equal ids, users and texts."""
    if run.tested_as(baseline):
        return
    ids = all(same_pairs(run.outcomes(kind), baseline.outcomes(kind)) for kind in USER_KINDS)
    what = "pairs of the same ids with other texts" if ids else "other test pairs"
    raise bad_value(
        "eval.baseline",
        str(baseline.path),
        f"a run on the same test pairs ({run.path} has {what})",
        "Name a run on the same data, splits and seed, or leave eval.baseline out",
    )


def with_holm(frame: pd.DataFrame) -> pd.DataFrame:
    """Add p-values adjusted by Holm's method over all runs and both kinds of users."""
    columns = [f"{kind}_p_value" for kind in USER_KINDS]
    given = [None if pd.isna(p) else float(p) for column in columns for p in frame[column]]
    adjusted = pd.Series(holm(given), dtype=float).to_numpy().reshape(len(columns), -1)
    for kind, values in zip(USER_KINDS, adjusted, strict=True):
        frame[f"{kind}_p_holm"] = values
    return frame


def comparison_table(frame: pd.DataFrame) -> TerminalTable:
    """Return the frame of `comparison_frame` as a table for the terminal."""
    table, shared = comparison(frame)
    title = f"Test results, 95% intervals over users{shared}"
    left_out = ["mean of users, %", "worst tenth, %", "effect", "price, nats"]
    return rich_table(table, title=title, without=left_out)


def comparison(frame: pd.DataFrame) -> tuple[Table, str]:
    """Return the frame as a table, and a text that names the settings common to all runs."""
    values = {key: frame[key].dropna().unique() for key in SETTINGS}
    varied = [key for key in SETTINGS if len(values[key]) > 1]
    varied += ["others"] * bool((frame["others"].fillna("") != "").any())
    shared = [f"{key} {values[key][0]}" for key in SETTINGS if len(values[key]) == 1]
    groups = []
    for kind in USER_KINDS:
        rows = [
            [
                Cell(str(row["run"])),
                Cell(str(row["role"])),
                *(Cell("" if pd.isna(row[key]) else str(row[key])) for key in varied),
                percent(estimate_in(row, f"{kind}_accuracy_micro")),
                percent(estimate_in(row, f"{kind}_accuracy_macro")),
                percent(estimate_in(row, f"{kind}_accuracy_worst10")),
                points(estimate_in(row, f"{kind}_difference_micro")),
                estimate_cell(estimate_in(row, f"{kind}_effect_size"), "+z.2f"),
                p_cell(row[f"{kind}_p_holm"]),
                estimate_cell(estimate_in(row, f"{kind}_gain_recovered"), "z.2f"),
                estimate_cell(estimate_in(row, f"{kind}_price_nll"), "+z.3f"),
            ]
            for _, row in frame.iterrows()
            if row[f"{kind}_n_pairs"] > 0
        ]
        groups.append((f"{kind.capitalize()} users", rows))
    measures = ["accuracy, %", "mean of users, %", "worst tenth, %"]
    measures += ["over baseline", "effect", "p", "gain", "price, nats"]
    table = Table(["run", "role", *varied, *measures], groups, tuple(range(2 + len(varied))))
    return table, "".join(f", {words}" for words in shared)


def p_cell(p_value: float) -> Cell:
    """Format a p-value."""
    if pd.isna(p_value):
        return Cell("–")
    return Cell("<0.001" if p_value < 0.001 else f"{p_value:.3f}")


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or as much of the paths as makes them unique."""
    resolved = [path.resolve() for path in paths]
    names = [path.name for path in resolved]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(resolved)
    return [str(path.relative_to(common)) for path in resolved]


def _baseline_among(runs: Sequence[Run], run: Run) -> Run | None:
    """Find the vanilla run of the same seed and test pairs that is nearest to a run."""
    seed = run.settings["seed"]
    alike = [one for one in runs if one.settings["seed"] == seed and one.tested_as(run)]
    return nearest_baseline(run, alike)


def nearest_baseline(run: Run, candidates: Sequence[Run]) -> Run | None:
    """Find the vanilla run with the same model and data; None for a run that is itself vanilla.

    If there are several, it is the one with the most other settings in common.

    Args:
        candidates: runs of the same seeds that share test pairs with `run`.
    """
    if run.role == "vanilla":
        return None
    fitting = [
        other
        for other in candidates
        if other.role == "vanilla"
        and other.settings["model"] == run.settings["model"]
        and _same_data(run, other)
    ]

    def in_common(other: Run) -> int:
        return sum(run.config.get(part) == other.config.get(part) for part in PARTS)

    return max(fitting, key=in_common, default=None)


def _same_data(first: Run, second: Run) -> bool:
    """Whether two runs have the same settings of the data, apart from `BESIDE_THE_DATA`."""
    ours, theirs = (
        {k: v for k, v in run.config["data"].items() if k not in (*BESIDE_THE_DATA, "seed")}
        for run in (first, second)
    )
    return ours == theirs


def run_row(run: Run, baseline: Run | None, *, paired_on: Run | None = None) -> dict[str, Any]:
    """Return a run's row of the comparison frame.

    Args:
        baseline: the run that it is paired with, or None.
        paired_on: the same run, reduced to the pairs it has in common with the baseline; None: the
            run has no other pairs.
    """
    row: dict[str, Any] = {"run": run.name, "role": run.role, **run.settings}
    row |= _accuracy_columns({kind: run.results.test[kind]["user"] for kind in USER_KINDS})
    if baseline is not None and baseline.path.resolve() == run.path.resolve():
        baseline = None
    row["baseline"] = None if baseline is None else baseline.name
    for kind in USER_KINDS:
        row |= _paired_columns(run if paired_on is None else paired_on, baseline, kind)
    for name, cell in run.results.cells.items():
        accuracy = NO_ESTIMATE if cell is None else cell["user"]["accuracy_micro"]
        row |= columns_of(f"{name}_accuracy_micro", accuracy)
        row[f"{name}_n_pairs"] = 0 if cell is None else cell["user"]["n_pairs"]
    return row


def _paired_columns(run: Run, baseline: Run | None, kind: str) -> dict[str, Any]:
    """Return the columns of a run's paired difference from its baseline for one kind of user.

    They are empty without a baseline, or without such users.
    """
    difference: PairedTest = {
        "accuracy_micro": NO_ESTIMATE,
        "accuracy_macro": NO_ESTIMATE,
        "effect_size": NO_ESTIMATE,
        "p_value": None,
    }
    gain = price = NO_ESTIMATE
    personal, oracle = run.outcomes(kind), run.outcomes(kind, "oracle")
    if baseline is not None and len(personal) > 0:
        theirs = baseline.outcomes(kind)
        difference = paired_test(personal, theirs)
        generic = run.outcomes(kind, "generic")
        price = paired_difference(generic, theirs, names=("nll",))["nll"]
        if len(oracle) > 0:
            gain = gain_recovered(personal, theirs, oracle)
    return {
        **columns_of(f"{kind}_difference_micro", difference["accuracy_micro"]),
        **columns_of(f"{kind}_difference_macro", difference["accuracy_macro"]),
        **columns_of(f"{kind}_effect_size", difference["effect_size"]),
        f"{kind}_p_value": difference["p_value"],
        f"{kind}_p_holm": None,  # known once all runs are
        **columns_of(f"{kind}_gain_recovered", gain),
        **columns_of(f"{kind}_price_nll", price),
    }


def _accuracy_columns(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of the three accuracies and the counts, for both kinds of users."""
    row: dict[str, Any] = {}
    for kind in USER_KINDS:
        for name in ("accuracy_micro", "accuracy_macro", "accuracy_worst10"):
            row |= columns_of(f"{kind}_{name}", cells[kind][name])
        row |= {f"{kind}_{name}": cells[kind][name] for name in ("n_pairs", "n_users")}
    return row


def columns_of(name: str, estimate: Estimate) -> dict[str, float | None]:
    """Return an estimate as the columns `name`, `name`_low and `name`_high."""
    low, high = (None, None) if estimate["ci95"] is None else estimate["ci95"]
    return {name: estimate["value"], f"{name}_low": low, f"{name}_high": high}


def estimate_in(row: pd.Series, name: str) -> Estimate:
    """Read an estimate from the columns that `columns_of` made."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if pd.isna(value):
        return NO_ESTIMATE
    return {"value": float(value), "ci95": None if pd.isna(low) else [float(low), float(high)]}
