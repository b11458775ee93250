"""Writes a run's report.html, section by section.

It reads the files of the run directory and nothing else. The notebooks show the same sections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plrhf.evaluation.results import read_metrics
from plrhf.reporting.figures import (
    few_shot_curves,
    learning_curves,
    reliability_diagram,
    seen_against_unseen,
    user_bars,
)
from plrhf.reporting.page import Section, write_page
from plrhf.reporting.runs import Run, read_run
from plrhf.reporting.samples import generations_section
from plrhf.reporting.summary import run_lead
from plrhf.reporting.tables import (
    few_shot_table,
    grid_table,
    headline,
    interval_note,
    key_table,
    winrate_table,
)
from plrhf.reporting.user_map import cluster_table, token_table, user_map, weight_bars


def write_report(run_dir: Path | str) -> Path:
    """Write a run's report.html from the files of its directory, and return its path.

    results.json and predictions.parquet are required. users.json, adapt.json, generations.jsonl,
    winrate.json, metrics.csv and config.yaml each add a section if they exist. Files that another
    model left in the directory are listed but not shown.
    """
    run = read_run(run_dir)
    settings = ", ".join(f"{key} {value}" for key, value in run.settings.items())
    results = results_section(run)
    sections: list[Section | None] = [
        replace(results, figures=results.figures[1:]),  # the lead shows the first
        users_section(run),
        user_model_section(run),
        tokens_section(run),
        new_users_section(run),
        generations_section(run),
        winrate_section([run]),
        learning_section(run),
        data_section(run),
        probes_section(run),
        overlap_section(run),
        provenance_section(run),
    ]
    if len(run.files_of_other_models) > 0:
        files = ", ".join(run.files_of_other_models)
        note = f"Not shown, as another model left them in this directory: {files}."
        sections.insert(0, Section("Files of another model", warnings=[note]))
    title = f"Run {run.name}"
    return write_page(run.path / "report.html", title, settings, sections, run_lead(run))


def results_section(run: Run) -> Section:
    """Show the table of test results, seen against unseen users, and calibration."""
    figures = [seen_against_unseen(run.results), reliability_diagram(run)]
    note = interval_note(run.results)
    return Section("Test results", note, table=headline(run.results), figures=figures)


def users_section(run: Run) -> Section:
    """Show the accuracy of each user."""
    return Section("Accuracy by user", figures=user_bars(run))


def user_model_section(run: Run) -> Section | None:
    """Show a map of the user vectors and the cluster weights; None without user vectors."""
    learned = run.learned
    if learned is None or len(learned.users) == 0:
        return None
    note = (
        "User vectors on their first two principal components. The model treats users alike whose "
        "marks are close. Colours are kinds of users where these are known, else largest clusters."
    )
    if learned.generic["weights"] is None:
        return Section("User model", note, figures=[user_map(run, learned)])
    figures = [user_map(run, learned), weight_bars(learned)]
    return Section("User model", note, table=cluster_table(learned), figures=figures)


def tokens_section(run: Run) -> Section | None:
    """Show the tokens nearest to the soft prompt vectors; None without a soft prompt."""
    if run.learned is None or len(run.learned.nearest_tokens) == 0:
        return None
    note = (
        "Tokens of the vocabulary nearest to each soft prompt vector, with the cosine of the first. "
        "A vector whose cosine is far below 1 is not like any word."
    )
    return Section("Soft prompts in words", note, table=token_table(run.learned))


def new_users_section(run: Run) -> Section | None:
    """Show the accuracy on new users after a few pairs; None before eval=adapt."""
    adapted = run.adapted
    if adapted is None:
        return None
    by = f" (eval/adaptation={adapted.adaptation['name']})" if "name" in adapted.adaptation else ""
    note = (
        f"Only the user is fitted{by}, to k pairs of each of {adapted.n_users} new users, and tested on "
        f"their other pairs; {adapted.n_draws} draws. Pooled: fitted to k pairs of k other people, so "
        "its gain is not personal. Other user: fitted to k pairs of one other person, which should lose."
    )
    figures = [few_shot_curves(adapted)]
    return Section("New users", note, table=few_shot_table(adapted), figures=figures)


def winrate_section(runs: Sequence[Run]) -> Section | None:
    """Show how often the judge prefers the runs' texts; None before eval=winrate."""
    judged = [(run.name, run.winrate) for run in runs if run.winrate is not None]
    if len(judged) == 0:
        return None
    note = (
        "How often the judge finds the run's text better for its user than the other's on the same "
        "prompt, ties one half; 95% intervals over users. A chat judge is asked in both orders; one "
        "that prefers the first text at 100% goes by order alone."
    )
    return Section("Win rates", note, table=winrate_table(judged))


def learning_section(run: Run) -> Section | None:
    """Show loss and accuracy by step; None without metrics.csv."""
    metrics = read_metrics(run.path)
    figures = [] if metrics is None else learning_curves(metrics)
    return Section("Learning curves", figures=figures) if len(figures) > 0 else None


def data_section(run: Run) -> Section | None:
    """Show the counts of rows."""
    table = key_table(run.results.data, "count")
    note = "Rows read, refused by reason, truncated or dropped, and kept in each split."
    return None if table is None else Section("Data", note, table=table)


def overlap_section(run: Run) -> Section | None:
    """Show how many pairs of the splits share users, prompts or texts; None without leak probes."""
    probes = run.results.probes
    if len(probes) == 0:
        return None
    note = "Pairs of the later split, and how many of them share something with the earlier one."
    return Section("Overlap of splits", note, table=grid_table(probes["overlap"]))


def probes_section(run: Run) -> Section | None:
    """Show the accuracy by format and by length alone, and all warnings; None without leak probes."""
    probes = run.results.probes
    if len(probes) == 0:
        return None
    blind = {name: value for name, value in probes.items() if name not in ("overlap", "warnings")}
    note = "Accuracy on val of classifiers that see format alone or length alone; 0.5 is chance."
    warnings = probes["warnings"]
    return Section("Leak probes", note, warnings=warnings, table=key_table(blind, "found"))


def provenance_section(run: Run) -> Section | None:
    """Show the commands, the versions, the hashes of the rows, and all settings."""
    results = run.results
    how: dict[str, Any] = {} if results.run is None else {"run": results.run.to_json()}
    if results.provenance is not None:
        how["evaluated"] = results.provenance.to_json()
    table = key_table(how, "value")
    config = run.path / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    if table is None and text == "":
        return None
    return Section("How it was made", table=table, text_name="config.yaml", text=text)
