"""A run's report.html: what its sections say.

Made from nothing but the files of run directories. A notebook shows the same sections.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from plrhf.core.stats import paired_difference
from plrhf.evaluation.generations import GeneratedText
from plrhf.evaluation.metrics import USER_KINDS
from plrhf.reporting.figures import (
    few_shot_curves,
    learning_curves,
    reliability_diagram,
    seen_against_unseen,
    user_bars,
)
from plrhf.reporting.page import Section, Tile, write_page
from plrhf.reporting.runs import Run, read_run
from plrhf.reporting.tables import (
    Cell,
    few_shot_table,
    grid_table,
    headline,
    interval_note,
    key_table,
    percent,
    points,
    winrate_table,
)
from plrhf.reporting.user_map import cluster_table, token_table, user_map, weight_bars

N_SHOWN = 3  # users and prompts of the sample generations


def write_report(run_dir: Path | str) -> Path:
    """Write a run's report.html from the files of its directory, and return its path.

    Needs results.json and predictions.parquet; users.json, adapt.json, generations.jsonl,
    winrate.json, metrics.csv and config.yaml add their sections where they are. Files that another
    model left in the directory are named and not shown.
    """
    run = read_run(run_dir)
    settings = ", ".join(f"{key} {value}" for key, value in run.settings.items())
    sections: list[Section | None] = [
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
    if len(run.left_over) > 0:
        files = ", ".join(run.left_over)
        note = f"Not shown, as another model left them in this directory: {files}."
        sections.insert(0, Section("Files of another model", warnings=[note]))
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
    if learned is None or len(learned.users) == 0:
        return None
    note = (
        "User vectors on their first two principal components: who lie together are treated alike. "
        "Colours are kinds of users where these are known, else their largest cluster."
    )
    if learned.generic["weights"] is None:
        return Section("User model", note, figures=[user_map(run, learned)])
    figures = [user_map(run, learned), weight_bars(learned)]
    return Section("User model", note, table=cluster_table(learned), figures=figures)


def tokens_section(run: Run) -> Section | None:
    """Words nearest to the soft prompt vectors; None without a soft prompt."""
    if run.learned is None or len(run.learned.nearest_tokens) == 0:
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
        f"Only the user's own parameters are fitted, on k pairs of each of {adapted.n_users} new "
        f"users, and tested on their other pairs; {adapted.n_draws} draws. Pooled: the same fitted on "
        "k pairs of k other people, so what it gains is not personal. Other user: on pairs of one "
        "other person, which should lose."
    )
    figures = [few_shot_curves(adapted)]
    return Section("New users", note, table=few_shot_table(adapted), figures=figures)


def winrate_section(runs: Sequence[Run]) -> Section | None:
    """How often users like the runs' texts better, as eval=winrate left it; None before that."""
    judged = [(run.name, run.winrate) for run in runs if run.winrate is not None]
    if len(judged) == 0:
        return None
    note = (
        "How often the judge finds the run's text better for its user than the other's on the same "
        "prompt, ties one half; 95% intervals over users. A judge who reads one text after the "
        "other is asked in both orders: at 100% for the first text it has not read them."
    )
    return Section("Win rates", note, table=winrate_table(judged))


def learning_section(run: Run) -> Section | None:
    """Loss and accuracy by step; None without metrics.csv."""
    path = run.path / "metrics.csv"
    figures = learning_curves(pd.read_csv(path)) if path.is_file() else []
    return Section("Learning curves", figures=figures) if len(figures) > 0 else None


def generations_section(run: Run) -> Section | None:
    """What is written for different users on the same prompt; None without generations.jsonl.

    The first users and prompts of the file: eval=generate with eval.users=[...] chooses them.
    """
    if len(run.texts) == 0:
        return None
    users = list(dict.fromkeys(text.user_id for text in run.texts))[:N_SHOWN]
    by_prompt: dict[str, dict[str, Any]] = {}
    for text in run.texts:
        if text.user_id in users:
            people = by_prompt.setdefault(_prompt_text(text.prompt), {})
            person = _person(text)
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
    table = key_table(run.results.data, "count")
    note = "Rows read, refused by reason, truncated or dropped, and kept in each split."
    return None if table is None else Section("Data", note, table=table)


def overlap_section(run: Run) -> Section | None:
    """What splits share; None without leak probes."""
    probes = run.results.probes
    if len(probes) == 0:
        return None
    note = "Pairs of the later split, and how many of them share something with the earlier one."
    return Section("Overlap of splits", note, table=grid_table(probes["overlap"]))


def probes_section(run: Run) -> Section | None:
    """What can be told without reading, and the warnings of all probes; None without probes."""
    probes = run.results.probes
    if len(probes) == 0:
        return None
    blind = {name: value for name, value in probes.items() if name not in ("overlap", "warnings")}
    note = "What form alone and length alone give away on val, 0.5 being chance."
    warnings = probes["warnings"]
    return Section("Leak probes", note, warnings=warnings, table=key_table(blind, "found"))


def provenance_section(run: Run) -> Section | None:
    """The commands, versions, hashes of the rows, and all settings."""
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


def _tiles(run: Run) -> list[Tile]:
    tiles = []
    for kind in USER_KINDS:
        personal, generic = run.outcomes(kind), run.outcomes(kind, "generic")
        if len(personal) == 0:
            continue
        cell = percent(run.results.test[kind]["user"]["accuracy_micro"])
        tiles.append(Tile(f"Accuracy, {kind} users", Cell(f"{cell.value}%", cell.interval)))
        if len(generic) > 0:
            gain = points(paired_difference(personal, generic)["accuracy_micro"])
            tile = Tile(f"Over generic context, {kind}", Cell(f"{gain.value} pts", gain.interval))
            tiles.append(tile)
    return tiles


def _person(text: GeneratedText) -> dict[str, Any]:
    """A text as shown; the reference's, which knows no user, under its own name."""
    if text.writer == "reference":
        return {
            **{"user_id": "reference, for everybody", "profile": None, "score": None},
            "response": text.response,
        }
    return {
        "user_id": text.user_id,
        "profile": text.profile,
        "score": None if text.score is None else format(text.score, ".2f"),
        "response": text.response,
    }


def _prompt_text(prompt: Any) -> str:
    """A prompt as text, turns of a chat one a line."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
