"""A run's report.html and the comparison of several runs: what the pages say.

Made from nothing but the files of run directories. A notebook shows the same sections.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from plrhf.core.errors import bad_value
from plrhf.core.stats import paired_difference
from plrhf.evaluation.metrics import USER_KINDS
from plrhf.reporting.comparison import COMPARISON_NOTE, comparison, comparison_frame, names
from plrhf.reporting.curves import sweep_curves
from plrhf.reporting.figures import (
    comparison_bars,
    few_shot_curves,
    learning_curves,
    reliability_diagram,
    seen_against_unseen,
    user_bars,
)
from plrhf.reporting.page import Section, Tile, write_page
from plrhf.reporting.runs import Run, read_run
from plrhf.reporting.seeds import (
    at_base,
    base_values,
    curves_table,
    over_seeds,
    seeds_frame,
    seeds_note,
    seeds_table,
)
from plrhf.reporting.tables import (
    Cell,
    Table,
    few_shot_table,
    grid_table,
    headline,
    interval_note,
    key_table,
    latex,
    markdown,
    percent,
    points,
    winrate_table,
)
from plrhf.reporting.user_map import cluster_table, token_table, user_map, weight_bars

N_SHOWN = 3  # users and prompts of the sample generations


def write_report(run_dir: Path | str) -> Path:
    """Write a run's report.html from the files of its directory, and return its path.

    Needs results.json and predictions.parquet; users.json, adapt.json, generations.jsonl,
    winrate.json, metrics.csv and config.yaml add their sections where they are.
    """
    run = read_run(run_dir)
    settings = ", ".join(f"{key} {value}" for key, value in run.settings.items())
    sections = [
        results_section(run),
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
    title = f"Run {run.name}"
    return write_page(run.path / "report.html", title, settings, sections, _tiles(run))


def results_section(run: Run) -> Section:
    """The headline table, seen against unseen users, and calibration."""
    figures = [seen_against_unseen(run.results), reliability_diagram(run)]
    note = interval_note(run.results)
    return Section("Test results", note, table=headline(run.results), figures=figures)


def users_section(run: Run) -> Section:
    """Each user's accuracy."""
    return Section("Accuracy by user", figures=user_bars(run))


def user_model_section(run: Run) -> Section | None:
    """Where user vectors lie and which clusters users are of; None where users are not told apart."""
    learned = run.learned
    if learned is None or len(learned["users"]) == 0:
        return None
    note = (
        "User vectors on their first two principal components: who lie together are treated alike. "
        "Colours are kinds of users where these are known, else their largest cluster."
    )
    if learned["generic"]["weights"] is None:
        return Section("User model", note, figures=[user_map(run, learned)])
    figures = [user_map(run, learned), weight_bars(learned)]
    return Section("User model", note, table=cluster_table(learned), figures=figures)


def tokens_section(run: Run) -> Section | None:
    """Words nearest to the soft prompt vectors; None without a soft prompt."""
    if run.learned is None or len(run.learned["nearest_tokens"]) == 0:
        return None
    note = (
        "Tokens of the vocabulary nearest to each soft prompt vector, with the cosine of the first. "
        "Far from 1, a vector is like no word: read with care."
    )
    return Section("Soft prompts in words", note, table=token_table(run.learned))


def new_users_section(run: Run) -> Section | None:
    """What a few pairs of a new user give, as eval=adapt left it; None before that."""
    adapted = run.adapted
    if adapted is None:
        return None
    note = (
        f"Only the user's own parameters are fitted, on k pairs of each of {adapted['n_users']} new "
        f"users, and tested on their other pairs; {adapted['n_draws']} draws. Pooled: the same "
        "fitted on pairs of somebody else, which should gain nothing."
    )
    figures = [few_shot_curves(adapted)]
    return Section("New users", note, table=few_shot_table(adapted), figures=figures)


def winrate_section(runs: Sequence[Run]) -> Section | None:
    """How often users like the runs' texts better, as eval=winrate left it; None before that."""
    judged = [run for run in runs if run.winrate is not None]
    if len(judged) == 0:
        return None
    note = (
        "How often the judge finds the run's text better for its user than the other's on the same "
        "prompt, ties one half; 95% intervals over users. A judge who reads one text after the "
        "other is asked in both orders: at 100% for the first text it has not read them."
    )
    table = winrate_table([(run.name, run.winrate) for run in judged])
    return Section("Win rates", note, table=table)


def learning_section(run: Run) -> Section | None:
    """Loss and accuracy by step; None without metrics.csv."""
    path = run.path / "metrics.csv"
    figures = learning_curves(pd.read_csv(path)) if path.is_file() else []
    return Section("Learning curves", figures=figures) if len(figures) > 0 else None


def generations_section(run: Run) -> Section | None:
    """What is written for different users on the same prompt; None without generations.jsonl.

    The first users and prompts of the file: eval=generate with eval.users=[...] chooses them.
    """
    path = run.path / "generations.jsonl"
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    users = list(dict.fromkeys(row["user_id"] for row in rows))[:N_SHOWN]
    by_prompt: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["user_id"] in users:
            people = by_prompt.setdefault(_prompt_text(row["prompt"]), {})
            person = _person(row)
            people.setdefault(person["user_id"], person)
    samples = [
        {"prompt": prompt, "people": list(people.values())} for prompt, people in by_prompt.items()
    ]
    note = (
        "What the model writes for different users on the same prompt. "
        "Others: eval=generate with eval.users=[...]."
    )
    return Section("Generations", note, samples=samples[:N_SHOWN])


def data_section(run: Run) -> Section | None:
    """Counts of rows."""
    table = key_table(run.results.get("data", {}), "count")
    note = "Rows read, refused by reason, truncated or dropped, and kept in each split."
    return None if table is None else Section("Data", note, table=table)


def overlap_section(run: Run) -> Section | None:
    """What splits share; None without leak probes."""
    probes = run.results.get("probes")
    if probes is None or len(probes) == 0:
        return None
    note = "Pairs of the later split, and how many of them share something with the earlier one."
    return Section("Overlap of splits", note, table=grid_table(probes["overlap"]))


def probes_section(run: Run) -> Section | None:
    """What can be told without reading, and the warnings of all probes; None without probes."""
    probes = run.results.get("probes")
    if probes is None or len(probes) == 0:
        return None
    blind = {name: value for name, value in probes.items() if name not in ("overlap", "warnings")}
    note = "What form alone and length alone give away on val, 0.5 being chance."
    warnings = probes["warnings"]
    return Section("Leak probes", note, warnings=warnings, table=key_table(blind, "found"))


def provenance_section(run: Run) -> Section | None:
    """The command, versions and all settings."""
    table = key_table(run.results.get("run", {}), "value")
    config = run.path / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    if table is None and text == "":
        return None
    return Section("How it was made", table=table, text_name="config.yaml", text=text)


def compare(
    runs: str | Sequence[Path], out: Path | str, *, baseline: Path | str | None = None
) -> pd.DataFrame:
    """Set finished runs side by side; leaves comparison.csv, .md, .tex and report.html in out.

    Differences are paired with the vanilla run of the same model, data, seed and test pairs, where
    there is one. Directories without results are skipped and named. Where runs differ in seed alone,
    over_seeds.csv, .md and .tex and the page's first table have one row for them.

    Args:
        runs: a glob of run directories, or the directories.
        out: directory to write to, made where it is not there.
        baseline: a run's directory, to pair all runs with that one instead.

    Returns:
        One row a run, then oracle and length-only for each test set; intervals in columns ending
        in ``_low`` and ``_high``; ``attrs["skipped"]`` names what was skipped, ``attrs["over_seeds"]``
        is the table over seeds, or None.

    Raises:
        ValueError: no directory matches, none of them holds results, or a run does not hold the
            pairs of the baseline.
    """
    there, skipped = read_runs(runs)
    frame = comparison_frame(there, baseline=None if baseline is None else read_run(baseline))
    frame.attrs["skipped"] = skipped
    pooled = over_seeds(there)
    several = baseline is None and any("by_seed" in run.results for run in pooled)
    base = base_values(pooled)
    of_seeds = seeds_frame(at_base(pooled, base)) if several else None
    frame.attrs["over_seeds"] = None if of_seeds is None else seeds_table(of_seeds)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    table, shared = comparison(frame)
    _write_tables(out / "comparison", frame, table, _notes(frame))
    if of_seeds is not None:
        _write_tables(out / "over_seeds", of_seeds, frame.attrs["over_seeds"], [seeds_note(base)])
    sections = [
        *([] if of_seeds is None else [seeds_section(of_seeds, base)]),
        sweeps_section(pooled),
        comparison_section(frame, folded=of_seeds is not None),
        few_shot_section(there),
        winrate_section(there),
        commands_section(there, folded=of_seeds is not None),
    ]
    subtitle = f"{len(there)} runs{shared}"
    write_page(out / "report.html", "Comparison of runs", subtitle, sections)
    return frame


def read_runs(runs: str | Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs of a glob, or of directories, and the directories without results.

    Raises:
        ValueError: no directory matches, or none of them holds results.
    """
    found = sorted(Path(path) for path in (glob.glob(runs) if isinstance(runs, str) else runs))
    finished = [path for path in found if (path / "results.json").is_file()]
    if len(finished) == 0:
        raise bad_value(
            "runs",
            runs if isinstance(runs, str) else [str(path) for path in runs],
            "a glob of run directories, at least one of which holds results.json",
            "Give the runs' own directories, quoted: eval=compare 'runs=outputs/*' out=comparison",
        )
    named = zip(finished, names(finished), strict=True)
    skipped = [str(path) for path in found if path.is_dir() and path not in finished]
    return [read_run(path, name=name) for path, name in named], skipped


def seeds_section(frame: pd.DataFrame, base: Mapping[str, Any]) -> Section:
    """The frame of `seeds_frame` as a table, of runs at `base_values`."""
    return Section("Test results over seeds", seeds_note(base), table=seeds_table(frame))


def comparison_section(frame: pd.DataFrame, *, folded: bool = False) -> Section:
    """The frame of `compare` as a table and bars; folded, the table alone, behind a click."""
    table, _ = comparison(frame)
    title = "Single runs" if folded else "Test results"
    figures = [] if folded else [comparison_bars(frame)]
    return Section(title, " ".join(_notes(frame)), table=table, folded=folded, figures=figures)


def sweeps_section(runs: Sequence[Run]) -> Section | None:
    """Accuracy over each setting in which otherwise equal runs differ; None where there is none."""
    figures = sweep_curves(runs)
    note = (
        "Runs that differ in this setting and in seed alone; lines are means over seeds, bars 95% "
        "intervals over users."
    )
    if len(figures) == 0:
        return None
    table = curves_table(runs)
    return Section("Curves over settings", note, table=table, folded=True, figures=figures)


def few_shot_section(runs: Sequence[Run]) -> Section | None:
    """Few-shot curves of the runs that eval=adapt has seen; None where there are none."""
    figures = [
        few_shot_curves(run.adapted, label=f"{run.name}: accuracy by pairs given")
        for run in runs
        if run.adapted is not None
    ]
    return Section("New users", figures=figures) if len(figures) > 0 else None


def commands_section(runs: Sequence[Run], *, folded: bool = False) -> Section:
    """The exact command and versions of each run."""
    rows = []
    for run in runs:
        how = run.results.get("run", {"command": "–", "versions": {}})
        versions = ", ".join(f"{name} {number}" for name, number in how["versions"].items())
        rows.append([Cell(run.name), Cell(how["command"]), Cell(versions)])
    table = Table(["run", "command", "versions"], [("", rows)], (0, 1, 2))
    return Section("How they were made", table=table, folded=folded)


def _tiles(run: Run) -> list[Tile]:
    tiles = []
    for kind in USER_KINDS:
        personal, generic = run.outcomes(kind), run.outcomes(kind, "generic")
        if len(personal) == 0:
            continue
        cell = percent(run.results["test"][kind]["user"]["accuracy_micro"])
        tiles.append(Tile(f"Accuracy, {kind} users", Cell(f"{cell.value}%", cell.interval)))
        if len(generic) > 0:
            gain = points(paired_difference(personal, generic)["accuracy_micro"])
            tile = Tile(f"Over generic context, {kind}", Cell(f"{gain.value} pts", gain.interval))
            tiles.append(tile)
    return tiles


def _person(row: Mapping[str, Any]) -> dict[str, Any]:
    """A text as shown; the reference's, which knows no user, under its own name."""
    if row.get("writer") == "reference":
        known = {"user_id": "reference, for everybody", "profile": None, "score": None}
    else:
        score = row.get("score")
        known = {
            "user_id": row["user_id"],
            "profile": row.get("profile"),
            "score": None if score is None else format(score, ".2f"),
        }
    return {**known, "response": row["response"]}


def _prompt_text(prompt: Any) -> str:
    """A prompt as text, turns of a chat one a line."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _notes(frame: pd.DataFrame) -> list[str]:
    skipped = frame.attrs["skipped"]
    named = [f"Skipped, as without results.json: {', '.join(skipped)}."] * (len(skipped) > 0)
    return [COMPARISON_NOTE, *named]


def _write_tables(path: Path, frame: pd.DataFrame, table: Table, notes: Sequence[str]) -> None:
    """The frame as .csv, its table as .md and .tex."""
    frame.to_csv(path.with_suffix(".csv"), index=False)
    path.with_suffix(".md").write_text(markdown(table, "\n\n".join(notes)), encoding="utf-8")
    path.with_suffix(".tex").write_text(latex(table, "\n".join(notes)), encoding="utf-8")
