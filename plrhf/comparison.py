"""Several runs as one frame and one table, each beside the vanilla run it is paired with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import rich.table

from plrhf.finished import SETTINGS, Run
from plrhf.metrics import USER_KINDS
from plrhf.stats import Estimate, gain_recovered, paired_difference, same_pairs
from plrhf.tables import Cell, Table, estimate_cell, percent, points, rich_table

NO_ESTIMATE: Estimate = {"value": None, "ci95": None}
COMPARISON_NOTE = (
    "User context, in brackets 95% intervals over users. Over vanilla: accuracy less that of the "
    "run without user vectors (same model, seed and test pairs), in points, paired. Gain: share of "
    "what the oracle wins over vanilla; no interval where the oracle's own lead may be 0."
)


def comparison_frame(runs: Sequence[Run]) -> pd.DataFrame:
    rows = [_run_row(run, _vanilla_of(run, runs)) for run in runs]
    worlds: list[Run] = []  # the first run of each test set
    for run in runs:
        if not any(_same_test(run, world) for world in worlds):
            worlds.append(run)
    for world in worlds:
        suffix = f" ({world.name})" if len(worlds) > 1 else ""
        references = {
            "oracle": world.results["oracle"],
            "length only": world.results["controls"]["length_only"],
        }
        rows += [
            {"run": f"{name}{suffix}", **_accuracy_columns(cells)}
            for name, cells in references.items()
            if cells is not None
        ]
    return pd.DataFrame(rows)


def comparison_table(frame: pd.DataFrame) -> rich.table.Table:
    """The frame of `compare`, for the terminal."""
    table, shared = comparison(frame)
    title = f"Test results, 95% intervals over users{shared}"
    return rich_table(table, title=title, without=["mean of users, %", "worst tenth, %"])


def comparison(frame: pd.DataFrame) -> tuple[Table, str]:
    """The frame as a table, and in words the settings that all runs share."""
    values = {key: frame[key].dropna().unique() for key in SETTINGS}
    varied = [key for key in SETTINGS if len(values[key]) > 1]
    shared = [f"{key} {values[key][0]}" for key in SETTINGS if len(values[key]) == 1]
    groups = []
    for kind in USER_KINDS:
        rows = [
            [
                Cell(str(row["run"])),
                *(Cell("" if pd.isna(row[key]) else str(row[key])) for key in varied),
                percent(_estimate_in(row, f"{kind}_accuracy_micro")),
                percent(_estimate_in(row, f"{kind}_accuracy_macro")),
                percent(_estimate_in(row, f"{kind}_accuracy_worst10")),
                points(_estimate_in(row, f"{kind}_difference_micro")),
                estimate_cell(_estimate_in(row, f"{kind}_gain_recovered"), "z.2f"),
            ]
            for _, row in frame.iterrows()
            if row[f"{kind}_n_pairs"] > 0
        ]
        groups.append((f"{kind.capitalize()} users", rows))
    measures = ["accuracy, %", "mean of users, %", "worst tenth, %", "over vanilla", "gain"]
    table = Table(["run", *varied, *measures], groups, tuple(range(1 + len(varied))))
    return table, "".join(f", {words}" for words in shared)


def names(paths: Sequence[Path]) -> list[str]:
    """Last parts of the paths, or all that differs where these are not unique."""
    resolved = [path.resolve() for path in paths]
    names = [path.name for path in resolved]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(resolved)
    return [str(path.relative_to(common)) for path in resolved]


def _vanilla_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """The first run of encoder none with the model, seed and test pairs of this one."""
    if run.settings["encoder"] == "none":
        return None
    wanted = {"encoder": "none", "model": run.settings["model"], "seed": run.settings["seed"]}
    for other in runs:
        if wanted.items() <= other.settings.items() and _same_test(run, other):
            return other
    return None


def _same_test(first: Run, second: Run) -> bool:
    return all(same_pairs(first.outcomes(kind), second.outcomes(kind)) for kind in USER_KINDS)


def _run_row(run: Run, vanilla: Run | None) -> dict[str, Any]:
    cells = {kind: run.results["test"][kind]["user"] for kind in USER_KINDS}
    row: dict[str, Any] = {"run": run.name, **run.settings, **_accuracy_columns(cells)}
    row["vanilla"] = None if vanilla is None else vanilla.name
    for kind in USER_KINDS:
        personal, oracle = run.outcomes(kind), run.outcomes(kind, "oracle")
        difference = {"accuracy_micro": NO_ESTIMATE, "accuracy_macro": NO_ESTIMATE}
        gain = NO_ESTIMATE
        if vanilla is not None and len(personal) > 0:
            difference = paired_difference(personal, vanilla.outcomes(kind))
            if len(oracle) > 0:
                gain = gain_recovered(personal, vanilla.outcomes(kind), oracle)
        row |= _columns(f"{kind}_difference_micro", difference["accuracy_micro"])
        row |= _columns(f"{kind}_difference_macro", difference["accuracy_macro"])
        row |= _columns(f"{kind}_gain_recovered", gain)
    return row


def _accuracy_columns(cells: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for kind in USER_KINDS:
        for name in ("accuracy_micro", "accuracy_macro", "accuracy_worst10"):
            row |= _columns(f"{kind}_{name}", cells[kind][name])
        row |= {f"{kind}_{name}": cells[kind][name] for name in ("n_pairs", "n_users")}
    return row


def _columns(name: str, estimate: Estimate) -> dict[str, float | None]:
    low, high = (None, None) if estimate["ci95"] is None else estimate["ci95"]
    return {name: estimate["value"], f"{name}_low": low, f"{name}_high": high}


def _estimate_in(row: pd.Series, name: str) -> Estimate:
    """The inverse of `_columns`."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if pd.isna(value):
        return NO_ESTIMATE
    return {"value": float(value), "ci95": None if pd.isna(low) else [float(low), float(high)]}
