"""A run's report.html and the comparison of several runs: what the pages say.

Made from nothing but the files of run directories. Pages are self-contained: styles inline, figures
as SVG, every value escaped.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from plrhf.comparison import COMPARISON_NOTE, comparison, comparison_frame, names
from plrhf.errors import bad_value
from plrhf.figures import (
    Drawing,
    comparison_bars,
    learning_curves,
    user_figures,
)
from plrhf.finished import Run, read_run
from plrhf.metrics import USER_KINDS
from plrhf.stats import paired_difference
from plrhf.tables import (
    Cell,
    Table,
    headline,
    interval_note,
    key_table,
    latex,
    markdown,
    percent,
    points,
)


@dataclass(frozen=True)
class Section:
    """A part of a page; what is empty is left out."""

    title: str
    note: str = ""
    table: Table | None = None
    figures: Sequence[Drawing] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    text_name: str = ""
    text: str = ""


@dataclass(frozen=True)
class Tile:
    """One of the figures a page opens with."""

    name: str
    cell: Cell


def write_report(run_dir: Path | str) -> Path:
    """Write a run's report.html from the files of its directory, and return its path.

    Needs results.json and predictions.parquet; metrics.csv, generations.jsonl and config.yaml add
    their sections where they are.
    """
    run = read_run(run_dir)
    settings = ", ".join(f"{key} {value}" for key, value in run.settings.items())
    sections = [
        Section("Test results", interval_note(run.results), table=headline(run.results)),
        *_curves_section(run.path / "metrics.csv"),
        Section("Users", figures=user_figures(run)),
        *_samples_section(run.path / "generations.jsonl"),
        *_data_section(run.results),
        *_provenance_sections(run),
    ]
    page = _page(f"Run {run.name}", settings, sections, _tiles(run))
    return _write(run.path / "report.html", page)


def compare(
    runs: str | Sequence[Path], out: Path | str, *, baseline: Path | str | None = None
) -> pd.DataFrame:
    """Set finished runs side by side; leaves comparison.csv, .md, .tex and report.html in out.

    Differences are paired with the vanilla run of the same model, data, seed and test pairs, where
    there is one. Directories without results are skipped and named.

    Args:
        runs: a glob of run directories, or the directories.
        out: directory to write to, made where it is not there.
        baseline: a run's directory, to pair all runs with that one instead.

    Returns:
        One row a run, then oracle and length-only for each test set; intervals in columns ending
        in ``_low`` and ``_high``; ``attrs["skipped"]`` names what was skipped.

    Raises:
        ValueError: no directory matches, none of them holds results, or a run does not hold the
            pairs of the baseline.
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
    frame = comparison_frame(
        [read_run(path, name=name) for path, name in named],
        baseline=None if baseline is None else read_run(baseline),
    )
    frame.attrs["skipped"] = [str(path) for path in found if path.is_dir() and path not in finished]
    _write_comparison(frame, Path(out))
    return frame


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


def _curves_section(path: Path) -> list[Section]:
    if not path.is_file():
        return []
    figures = learning_curves(pd.read_csv(path))
    return [Section("Learning curves", figures=figures)] if len(figures) > 0 else []


def _samples_section(path: Path, n_users: int = 3, n_prompts: int = 3) -> list[Section]:
    """The first prompts that the first users of generations.jsonl were answered on."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    users = list(dict.fromkeys(row["user_id"] for row in rows))[:n_users]
    rows = [row for row in rows if row["user_id"] in users]
    by_prompt: dict[str, dict[str, Any]] = {}
    for row in rows:
        prompt = _prompt_text(row["prompt"])
        score = row.get("score")
        person = {
            "user_id": row["user_id"],
            "profile": row.get("profile"),
            "response": row["response"],
            "score": None if score is None else format(score, ".2f"),
        }
        by_prompt.setdefault(prompt, {}).setdefault(row["user_id"], person)
    samples = [
        {"prompt": prompt, "people": list(people.values())} for prompt, people in by_prompt.items()
    ]
    note = "What the model writes for different users on the same prompt."
    return [Section("Sample generations", note, samples=samples[:n_prompts])]


def _prompt_text(prompt: Any) -> str:
    """A prompt as text, turns of a chat one a line."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _data_section(results: Mapping[str, Any]) -> list[Section]:
    table = key_table(results.get("data", {}), "count")
    note = "Rows read, refused by reason, truncated or dropped, and kept in each split."
    return [] if table is None else [Section("Data", note, table=table)]


def _provenance_sections(run: Run) -> list[Section]:
    table = key_table(run.results.get("run", {}), "value")
    config = run.path / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    if table is None and text == "":
        return []
    return [Section("How it was made", table=table, text_name="config.yaml", text=text)]


def _write_comparison(frame: pd.DataFrame, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "comparison.csv", index=False)
    table, shared = comparison(frame)
    skipped = frame.attrs["skipped"]
    notes = [COMPARISON_NOTE]
    if len(skipped) > 0:
        notes.append(f"Skipped, as without results.json: {', '.join(skipped)}.")
    _write(out / "comparison.md", markdown(table, "\n\n".join(notes)))
    _write(out / "comparison.tex", latex(table, "\n".join(notes)))
    figures = [comparison_bars(frame)]
    sections = [Section("Test results", " ".join(notes), table=table, figures=figures)]
    subtitle = f"{len(frame)} rows{shared}"
    _write(out / "report.html", _page("Comparison of runs", subtitle, sections))


def _page(
    title: str, subtitle: str, sections: Sequence[Section], tiles: Sequence[Tile] = ()
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(title=title, subtitle=subtitle, sections=sections, tiles=tiles)


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
