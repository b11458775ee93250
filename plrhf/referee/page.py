"""The leaderboard as files: referee.csv, referee.md and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context

from plrhf.core.bootstrap import Estimate
from plrhf.evaluation.records import write_text
from plrhf.referee.leaderboard import (
    NONE,
    VANILLA,
    Entry,
    Line,
    common_seeds,
    csv_rows,
    curve,
    entries,
    lines,
    new_users_gain,
    restricted,
    stability,
    warnings,
)
from plrhf.referee.store import Store
from plrhf.reporting.drawing import ACCENT, INK, MUTED, SERIES, STYLE, Drawing, drawing, panel
from plrhf.reporting.page import Section, write_page
from plrhf.reporting.tables import Cell, Table, csv_text, estimate_cell, markdown, percent, points

MOST_CURVES = 6
NOTE = (
    "Accuracy on test pairs of seen users, over all seeds, in per cent; brackets are 95% intervals from a "
    "bootstrap over users. Of each method's trials the one with the best val loss was asked test pairs, "
    "and no other. Over vanilla: paired difference in points; p: Holm's over the table. Wrong user: "
    "each person taken for another. Generic: nobody known; its price is the difference to vanilla. Agreed: "
    "pairs that nearly all judge alike. Rank: by accuracy, over the same draws of users."
)
WIDE = (
    "mean of users, %",
    "worst tenth, %",
    "nll",
    "ECE",
    "agreed, %",
    "s a user",
    "numbers a user",
)


@dataclass(frozen=True)
class Made:
    """What was written: the tables by rows, and the page."""

    tables: dict[str, Table]
    report: Path


def write_leaderboard(out: Path, store: Store) -> Made:
    """Write referee.csv, referee.md and report.html of all jobs that a store holds.

    Raises:
        ValueError: it holds none.
    """
    csv: list[dict[str, Any]] = []
    sections: list[Section] = []
    tables: dict[str, Table] = {}
    n_jobs = 0
    for folder in store.rows():  # one after the other, as margins of many pairs are large
        ((rows, whole),) = entries(store.jobs(folder)).items()
        n_jobs += sum(len(entry.records) for entry in whole)
        found = restricted(whole, common_seeds(whole))
        if not found[0].records:
            continue
        made = lines(found)
        tables[rows] = leaderboard_table(rows, made)
        csv += csv_rows(rows, found)
        sections += sections_of(rows, found, made, tables[rows])
    write_text(out / "referee.csv", csv_text(pd.DataFrame(csv)))
    write_text(out / "referee.md", "\n".join(_markdown(section) for section in sections))
    subtitle = f"{len(tables)} sets of rows, {n_jobs} jobs"
    report = write_page(out / "report.html", "The referee", subtitle, sections)
    return Made(tables, report)


def sections_of(
    rows: str, found: Sequence[Entry], made: Sequence[Line], table: Table
) -> list[Section]:
    """Return the sections of some rows: the leaderboard, new users, trials."""
    sections = [
        Section(
            rows, _note(found), warnings(found), table=table, figures=[rank_figure(rows, made)]
        ),
        Section(f"{rows}: trials", table=trials_table(found), folded=True),
    ]
    new = new_users_table(made)
    if new is not None:
        note = "Users that training has not seen, by pairs given; wrong: fitted to somebody else's pairs."
        figures = [few_shot_figure(rows, made)]
        sections.insert(1, Section(f"{rows}: new users", note, table=new, figures=figures))
    return sections


def _note(found: Sequence[Entry]) -> str:
    # Controls see other features than the methods.
    record = next((one for one in found if one.method == VANILLA), found[0]).records[0]
    seeds = ", ".join(str(seed) for seed in common_seeds(found))
    tau = stability(found, "seen")
    between = "" if tau is None else f" Kendall's tau of the ranking between seeds: {tau:.2f}."
    facts = record.facts
    spanned = (
        f" People differ in {facts['spanned']} of the first {facts['directions']} directions of "
        f"the features ({facts['users']} people)."
        if facts
        else ""
    )
    return f"{NOTE} {_stopped(found)} Seeds: {seeds}.{between}{spanned}"


def _stopped(found: Sequence[Entry]) -> str:
    """Say after which shares of the steps the worse half of a method's trials stopped."""
    told = sorted({entry.halvings for entry in found})
    if told == [""]:
        return "All trials were trained to the end."
    shares = "; ".join(one or "none" for one in told)
    of_methods = "" if len(told) == 1 else " (by method, see the trials)"
    return f"The worse half of the trials stopped after these shares of the steps: {shares}{of_methods}."


def leaderboard_table(rows: str, made: Sequence[Line]) -> Table:
    """Return one row a method, the best first."""
    columns = [
        *("method", "trials", "accuracy, %", "mean of users, %", "worst tenth, %", "nll", "ECE"),
        *("over vanilla", "p", "rank", "wrong user, %", "generic, %", "price", "agreed, %"),
        *("gain", "s a user", "numbers a user"),
    ]
    body = []
    for line in made:
        record = line.entry.records[0]
        rank = [round(end) for end in line.rank["ci95"] or ()]
        p = line.p_value
        body.append(
            [
                Cell(line.entry.method),
                Cell(str(len(record.trials))),
                percent(line.measures["accuracy_micro"]),
                percent(line.measures["accuracy_macro"]),
                percent(line.measures["accuracy_worst10"]),
                estimate_cell(line.measures["nll"], ".3f"),
                estimate_cell(line.measures["ece"], ".3f"),
                points(line.over_vanilla),
                Cell("–" if p is None else f"{p:.3f}"),
                Cell(f"{line.rank['value']:.0f}", f"[{rank[0]}, {rank[1]}]" if rank else ""),
                percent(line.wrong or NONE),
                percent(line.generic or NONE),
                points(line.over_generic or NONE),
                percent(line.agreed or NONE),
                estimate_cell(line.gain or NONE, "z.2f"),
                Cell(f"{record.seconds_per_user:.4f}" if record.seconds_per_user > 0 else "–"),
                Cell(str(record.numbers_per_user)),
            ]
        )
    users, pairs = made[0].measures["n_users"], made[0].measures["n_pairs"]
    title = f"{rows}: {users:,} seen users, {pairs:,} test pairs of all seeds"
    return Table(columns, [(title, body)])


def new_users_table(made: Sequence[Line]) -> Table | None:
    """Return accuracy on unseen users by pairs given, and fitted to somebody else's; None without any.

    Where people are simulated, the shares of the oracle's gain over vanilla follow.
    """
    curves = {line.entry.method: dict(curve(line.entry)) for line in made}
    shots = sorted({k for one in curves.values() for k in one})
    if len(shots) == 0:
        return None
    body = []
    for line in made:
        wrong = dict(curve(line.entry, "wrong"))
        last = wrong.get(shots[-1])
        cells = [percent(_at(curves[line.entry.method], k)) for k in shots]
        body.append([Cell(line.entry.method), *cells, percent(last or NONE)])
    columns = ["method", *(f"{k} given" for k in shots), f"wrong user, {shots[-1]} given"]
    asked = made[0].entry.outcomes("unseen", "generic")
    title = (
        f"{len(set(asked.user_id)):,} unseen users, {len(asked):,} pairs asked over seeds and draws"
    )
    groups = [(title, body)]
    entries_of = {line.entry.method: line.entry for line in made}
    gains = [
        [new_users_gain(line.entry, entries_of.get(VANILLA), k) for k in shots] for line in made
    ]
    shares = [
        [Cell(line.entry.method), *(estimate_cell(one or NONE, "z.2f") for one in found), Cell("–")]
        for line, found in zip(made, gains, strict=True)
        if any(one is not None for one in found)
    ]
    if len(shares) > 0:
        groups.append(("share of the oracle's gain over vanilla", shares))
    return Table(columns, groups)


def _at(found: dict[int, Estimate], k: int) -> Estimate:
    """The estimate at k pairs; who reads no pairs is answered alike whatever is given."""
    return found.get(k) or (found[0] if set(found) == {0} else NONE)


def trials_table(found: Sequence[Entry]) -> Table:
    """Return the trials of the first seed of each method: steps trained, and which was chosen on val."""
    columns = ["trial", "val loss", "val accuracy, %", "step", "of steps", "chosen"]
    groups = []
    for entry in found:
        record = entry.records[0]
        rows = [
            [
                Cell(", ".join(f"{name}={value}" for name, value in one["point"].items())),
                Cell(f"{one['val_loss']:.4f}"),
                Cell(f"{100 * one['val_accuracy']:.1f}"),
                Cell(str(one["step"])),
                Cell(str(one["n_steps"])),
                Cell("yes" if place == record.best else ""),
            ]
            for place, one in enumerate(record.trials)
        ]
        groups.append((f"{entry.method}, seed {record.seed}", rows))
    return Table(columns, groups)


@rc_context(STYLE)
def rank_figure(rows: str, made: Sequence[Line]) -> Drawing:
    """Return each method's rank with its interval, the best at the top."""
    figure, axes = panel(9.6, 0.6 + 0.2 * len(made))
    places = np.arange(len(made))
    values = np.array([line.rank["value"] for line in made], dtype=float)
    none = [np.nan, np.nan]  # of a single user
    ends = np.array([line.rank["ci95"] or none for line in made])
    axes.hlines(places, ends[:, 0], ends[:, 1], color=ACCENT, linewidth=2)
    axes.plot(values, places, "o", color=ACCENT, markersize=4)
    axes.set_yticks(places, [line.entry.method for line in made])
    axes.set(xlabel="rank by accuracy", xlim=(0.5, len(made) + 0.5))
    axes.invert_yaxis()
    axes.set_title(f"{rows}: ranks with 95% intervals over users")
    return drawing(figure, f"{rows}: ranks", wide=True)


@rc_context(STYLE)
def few_shot_figure(rows: str, made: Sequence[Line]) -> Drawing:
    """Return accuracy on new users by pairs given, of the best methods and of vanilla."""
    figure, axes = panel(9.6, 3.4)
    with_curves = [line for line in made if len(line.entry.shots()) > 1]
    colours = iter(SERIES)
    places: dict[int, int] = {}
    for line in with_curves[:MOST_CURVES]:
        found = curve(line.entry)
        places = {k: at for at, (k, _) in enumerate(found)}
        values, low, high = _percents([estimate for _, estimate in found])
        colour = next(colours)
        at = np.arange(len(found))
        axes.plot(at, values, color=colour, marker="o", markersize=3.5, label=line.entry.method)
        axes.fill_between(at, low, high, color=colour, alpha=0.08, linewidth=0)
    for line in made:
        if line.entry.method == VANILLA and len(line.entry.shots()) > 0:
            value = 100 * (curve(line.entry)[0][1]["value"] or np.nan)
            axes.axhline(value, color=MUTED, linestyle="--", label=VANILLA)
    axes.set_xticks(list(places.values()), [str(k) for k in places])
    axes.set(xlabel="pairs given", ylabel="accuracy, %")
    axes.set_title(f"{rows}: users that training has not seen")
    figure.legend(loc="outside lower right", ncols=4, labelcolor=INK)
    return drawing(figure, f"{rows}: new users", wide=True)


def _percents(found: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ends = [one["ci95"] or [np.nan, np.nan] for one in found]
    low, high = 100 * np.array(ends, dtype=float).reshape(-1, 2).T
    return 100 * np.array([one["value"] for one in found], dtype=float), low, high


def _markdown(section: Section) -> str:
    notes = "\n\n".join([section.note, *section.warnings])
    return markdown(section.table, notes, title=section.title) if section.table else ""
