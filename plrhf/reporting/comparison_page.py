"""Writes the comparison of finished runs: comparison.csv, .md, .tex and a report.html."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from plrhf.core.errors import bad_value, printable
from plrhf.evaluation.records import write_text
from plrhf.reporting import learning_curves
from plrhf.reporting.comparison import (
    COMPARISON_NOTE,
    Comparison,
    comparison,
    comparison_frame,
    distinct_names,
)
from plrhf.reporting.curves import sweep_curves
from plrhf.reporting.figures import comparison_bars, few_shot_curves
from plrhf.reporting.learning_curves import learning_curves_table
from plrhf.reporting.over_seeds import (
    curves_table,
    over_seeds,
    seeds_frame,
    seeds_note,
    seeds_table,
)
from plrhf.reporting.page import Section, address, link_back, write_page
from plrhf.reporting.report import winrate_section
from plrhf.reporting.runs import Run, read_run
from plrhf.reporting.summary import comparison_lead
from plrhf.reporting.tables import Cell, Table, csv_text, latex, markdown


def compare(
    runs: str | Sequence[Path], out: Path | str, *, baseline: Path | str | None = None
) -> Comparison:
    """Compare finished runs; write comparison.csv, .md, .tex and report.html to `out`.

    The page links to those of the runs, and they to it.

    Each run is paired with the vanilla run of the same model, data, seed and test pairs, if there is
    one. Directories without results are skipped and named. If runs differ in seed alone, the page
    begins with a table that has one row for all their seeds, also written to over_seeds.csv, .md and
    .tex. Runs that differ in pairs a user or in users have learning curves, also in learning_curves.md.

    Args:
        runs: a glob of run directories, or the directories. ``**`` matches any number of folders. A
            sweep's directory stands for its jobs.
        out: directory to write to; it is made if it does not exist.
        baseline: directory of the run that all runs are paired with instead.

    Raises:
        ValueError: no directory matches, none of them holds results, or a run does not hold the
            pairs of the baseline.
    """
    there, skipped = read_runs(runs)
    frame = comparison_frame(there, baseline=None if baseline is None else read_run(baseline))
    groups = over_seeds(there)
    several = baseline is None and any(len(run.of_seeds) > 0 for run in groups)
    made = Comparison(
        runs=there,
        frame=frame,
        skipped=skipped,
        over_seeds=seeds_frame(groups) if several else None,
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    table, shared = comparison(frame)
    _write_tables(out / "comparison", frame, table, _notes(made))
    if made.over_seeds is not None:
        note = seeds_note(made.over_seeds)
        _write_tables(out / "over_seeds", made.over_seeds, seeds_table(made.over_seeds), [note])
    of_groups = frame if made.over_seeds is None else made.over_seeds
    curved = learning_curves_table(groups, of_groups)
    if curved is not None:
        write_text(out / "learning_curves.md", markdown(curved, learning_curves.NOTE))
    pages = _pages(there, out)
    single = replace(comparison_section(made), figures=[])  # the lead shows them
    sections = [
        seeds_section(made),
        sweeps_section(groups),
        learning_curves_section(curved),
        _with_links(single, pages),
        few_shot_section(there),
        winrate_section(there),
        _with_links(commands_section(made), pages),
    ]
    lead = comparison_lead(groups if several else there, of_groups)
    subtitle = f"{len(there)} runs{shared}"
    page = write_page(out / "report.html", "Comparison of runs", subtitle, sections, lead)
    for run in there:
        link_back(run.path / "report.html", page)
    return made


def files(out: Path) -> list[Path]:
    """Return what a comparison has written to its directory."""
    tables = ("comparison", "over_seeds", "learning_curves")
    there = [out / f"{name}{ending}" for name in tables for ending in (".csv", ".md", ".tex")]
    return [path for path in (out / "report.html", *there) if path.is_file()]


def _pages(runs: Sequence[Run], out: Path) -> dict[str, str]:
    """Return the address of each run's report, seen from a page in `out`, by the name of the run."""
    reports = {run.name: run.path / "report.html" for run in runs}
    return {
        name: address(path, out / "report.html") for name, path in reports.items() if path.is_file()
    }


def _with_links(section: Section, pages: Mapping[str, str]) -> Section:
    """Link the names of runs in a table's first column to their reports."""
    table = section.table
    assert table is not None
    groups = [
        (title, [[one[0]._replace(link=pages.get(one[0].value, "")), *one[1:]] for one in rows])
        for title, rows in table.groups
    ]
    return replace(section, table=replace(table, groups=groups))


def read_runs(runs: str | Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read the finished runs of a glob, or of directories, and name the directories without results.

    Raises:
        ValueError: no directory matches, or none of them holds results.
    """
    recursive = isinstance(runs, str) and "**" in runs
    paths = glob.glob(runs, recursive=True) if isinstance(runs, str) else runs
    found = [one for path in sorted(Path(path) for path in paths) for one in _runs_in(path)]
    with_results = [path for path in found if (path / "results.json").is_file()]
    if recursive:  # what an evaluation left inside a run is no run of its own
        kept = set(with_results)
        with_results = [path for path in sorted(kept) if kept.isdisjoint(path.parents)]
    if len(with_results) == 0:
        raise bad_value(
            "runs",
            runs if isinstance(runs, str) else [str(path) for path in runs],
            "a glob of run directories, at least one of which holds results.json",
            "Give the runs' own directories, quoted: eval=compare 'runs=outputs/*' out=comparison",
        )
    named = zip(with_results, distinct_names(with_results), strict=True)
    skipped = [
        str(path) for path in found if path.is_dir() and path not in with_results and not recursive
    ]
    return [read_run(path, name=name) for path, name in named], skipped


def _runs_in(path: Path) -> list[Path]:
    """Return the job directories of a sweep's directory, or the directory itself if it is a run's."""
    if (path / "results.json").is_file() or not path.is_dir():
        return [path]
    jobs = sorted(one for one in path.iterdir() if one.is_dir())
    return jobs if any((one / "results.json").is_file() for one in jobs) else [path]


def seeds_section(made: Comparison) -> Section | None:
    """Show the table over seeds; None if no two runs differ in seed alone."""
    frame = made.over_seeds
    if frame is None:
        return None
    return Section("Test results over seeds", seeds_note(frame), table=seeds_table(frame))


def comparison_section(made: Comparison) -> Section:
    """Show single runs as a table and bars. With a table over seeds, it is a folded table alone."""
    folded = made.over_seeds is not None
    table, _ = comparison(made.frame)
    title = "Single runs" if folded else "Test results"
    figures = [] if folded else [comparison_bars(made.frame)]
    return Section(title, " ".join(_notes(made)), table=table, folded=folded, figures=figures)


def sweeps_section(runs: Sequence[Run]) -> Section | None:
    """Show accuracy over each setting in which otherwise equal runs differ; None without any."""
    figures = sweep_curves(runs)
    note = (
        "Runs that differ in this setting and in seed alone; lines are means over seeds, bars 95% "
        "intervals over users."
    )
    if len(figures) == 0:
        return None
    table = curves_table(runs)
    return Section("Curves over settings", note, table=table, folded=True, figures=figures)


def learning_curves_section(table: Table | None) -> Section | None:
    """Show how many pairs a user, and users, most of the oracle's gain takes; None without such runs."""
    if table is None:
        return None
    return Section("Learning curves", learning_curves.NOTE, table=table)


def few_shot_section(runs: Sequence[Run]) -> Section | None:
    """Show the few-shot curves of the runs that have an adapt.json; None without any."""
    figures = [
        few_shot_curves(run.adapted, label=f"{run.name}: accuracy by pairs given")
        for run in runs
        if run.adapted is not None
    ]
    return Section("New users", figures=figures) if len(figures) > 0 else None


def commands_section(made: Comparison) -> Section:
    """Show the exact command and the library versions of each run."""
    rows = []
    for run in made.runs:
        how = run.results.run
        versions = {} if how is None else how.versions
        words = ", ".join(f"{name} {number}" for name, number in versions.items())
        rows.append([Cell(run.name), Cell("–" if how is None else how.command), Cell(words)])
    table = Table(["run", "command", "versions"], [("", rows)], (0, 1, 2))
    return Section("How they were made", table=table, folded=made.over_seeds is not None)


def _notes(made: Comparison) -> list[str]:
    """Return the notes below the table: what it shows, and which directories were skipped."""
    named = []
    if len(made.skipped) > 0:
        named = [f"Skipped, as without results.json: {', '.join(map(printable, made.skipped))}."]
    return [COMPARISON_NOTE, *named]


def _write_tables(path: Path, frame: pd.DataFrame, table: Table, notes: Sequence[str]) -> None:
    """Write the frame as .csv, and its table as .md and .tex."""
    write_text(path.with_suffix(".csv"), csv_text(frame))
    write_text(path.with_suffix(".md"), markdown(table, "\n\n".join(notes)))
    write_text(path.with_suffix(".tex"), latex(table, "\n".join(notes)))
