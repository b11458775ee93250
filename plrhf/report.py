"""A run's report.html, the comparison of several runs, and the tables a terminal shows.

Made from nothing but the files of run directories. Pages are self-contained: styles inline, figures
as SVG whose colours follow the page (light, dark, print), every value escaped.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import rich.box
import rich.table
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.text import Text

from plrhf.errors import bad_value
from plrhf.metrics import USER_KINDS, outcomes
from plrhf.stats import (
    Estimate,
    Outcomes,
    gain_recovered,
    paired_difference,
    reliability,
    same_pairs,
    user_sums,
)

SETTINGS = ("model", "data", "encoder", "aggregator", "seed")
FEW_USERS = 20  # below it, percentile intervals over users are too narrow
CURVE_POINTS = 300
NO_ESTIMATE: Estimate = {"value": None, "ci95": None}

# Placeholders, one a role: `_drawing` turns each into the page's CSS variable of that name.
INK, MUTED, GRID, ACCENT, WARM = "#010101", "#020202", "#030303", "#040404", "#050505"
ROLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", WARM: "warm"}
KIND_COLOURS = {"seen": ACCENT, "unseen": WARM}
KIND_MARKERS = {"seen": "o", "unseen": "D"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a run may be called $x$
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "plrhf",
}


class Cell(NamedTuple):
    """A value as shown, and its interval where it has one."""

    value: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".rstrip()


@dataclass(frozen=True)
class Table:
    """What HTML, Markdown and the terminal show alike: rows in named groups."""

    columns: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
    texts: Sequence[int] = (0,)  # columns of words, set to the left


class Drawing(NamedTuple):
    """An inline figure."""

    svg: Markup
    caption: str = ""
    wide: bool = False


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


@dataclass(frozen=True)
class Run:
    """A finished run, read from its directory."""

    path: Path
    name: str
    results: dict[str, Any]
    predictions: pd.DataFrame = field(repr=False)

    @cached_property
    def settings(self) -> dict[str, str]:
        """What tells runs apart, as text."""
        return {key: _component(self.results["config"], key) for key in SETTINGS}

    def outcomes(self, user_kind: str, context: str = "user") -> Outcomes:
        """The run's test pairs of one kind of user."""
        return outcomes(self.predictions, user_kind=user_kind, context=context)


def read_run(run_dir: Path | str, *, name: str | None = None) -> Run:
    """Read results.json and predictions.parquet of a run directory.

    Raises:
        ValueError: one of the two is not there.
    """
    path = Path(run_dir)
    for file in ("results.json", "predictions.parquet"):
        if not (path / file).is_file():
            raise bad_value(
                "run", str(path), f"a directory that holds {file}", "Evaluate the run first"
            )
    return Run(
        path=path,
        name=path.resolve().name if name is None else name,
        results=json.loads((path / "results.json").read_text(encoding="utf-8")),
        predictions=pd.read_parquet(path / "predictions.parquet"),
    )


def write_report(run_dir: Path | str) -> Path:
    """Write a run's report.html from the files of its directory, and return its path.

    Needs results.json and predictions.parquet; metrics.csv, generations.jsonl and config.yaml add
    their sections where they are.
    """
    run = read_run(run_dir)
    settings = ", ".join(f"{key} {value}" for key, value in run.settings.items())
    sections = [
        Section("Test results", _interval_note(run.results), table=_headline(run.results)),
        *_curves_section(run.path / "metrics.csv"),
        Section("Users", figures=_user_figures(run)),
        *_samples_section(run.path / "generations.jsonl"),
        *_data_section(run.results),
        *_provenance_sections(run),
    ]
    page = _page(f"Run {run.name}", settings, sections, _tiles(run))
    return _write(run.path / "report.html", page)


def compare(runs: str | Sequence[Path], out: Path | str) -> pd.DataFrame:
    """Set finished runs side by side; leaves comparison.csv, comparison.md and report.html in out.

    Differences are paired with the run of encoder none, same model, same seed and same test pairs,
    where there is one. Directories without results are skipped and named.

    Args:
        runs: a glob of run directories, or the directories.
        out: directory to write to, made where it is not there.

    Returns:
        One row a run, then oracle and length-only for each test set; intervals in columns ending
        in ``_low`` and ``_high``; ``attrs["skipped"]`` names what was skipped.

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
    named = zip(finished, _names(finished), strict=True)
    frame = _comparison_frame([read_run(path, name=name) for path, name in named])
    frame.attrs["skipped"] = [str(path) for path in found if path.is_dir() and path not in finished]
    _write_comparison(frame, Path(out))
    return frame


def closing_table(results: Mapping[str, Any]) -> rich.table.Table:
    """The test results of results.json, for the terminal at a run's end."""
    return _rich(
        _headline(results), title="Test results, 95% intervals over users", without=["ECE"]
    )


def comparison_table(frame: pd.DataFrame) -> rich.table.Table:
    """The frame of `compare`, for the terminal."""
    table, shared = _comparison(frame)
    title = f"Test results, 95% intervals over users{shared}"
    return _rich(table, title=title, without=["mean of users, %", "worst tenth, %"])


# --- cells ---------------------------------------------------------------------------------------


def _component(config: Mapping[str, Any], key: str) -> str:
    """Name of a part of the config: its name, or the last word of its dotted path."""
    part = config.get(key)
    if part is None:
        return "none"
    if not isinstance(part, Mapping):
        return str(part)
    return str(part.get("name", part.get("_target_", "–"))).rsplit(".", 1)[-1]


def _cell(estimate: Estimate, number: str, *, scale: float = 1.0) -> Cell:
    """An estimate in the format ``number``, such as ``.3f``."""
    if estimate["value"] is None:
        return Cell("–")
    interval = ""
    if estimate["ci95"] is not None:
        low, high = (format(scale * end, number) for end in estimate["ci95"])
        interval = f"[{low}, {high}]"
    return Cell(format(scale * estimate["value"], number), interval)


def _percent(estimate: Estimate) -> Cell:
    return _cell(estimate, ".1f", scale=100)


def _points(estimate: Estimate) -> Cell:
    return _cell(estimate, "+z.1f", scale=100)


# --- one run -------------------------------------------------------------------------------------


def _headline_rows(results: Mapping[str, Any], kind: str) -> list[tuple[str, Mapping[str, Any]]]:
    rule = results["controls"]["length_only"]
    rows = [
        ("user context", results["test"][kind]["user"]),
        ("generic context", results["test"][kind]["generic"]),
        ("length only", rule[kind]),
    ]
    if results["oracle"] is not None:
        rows.insert(2, ("oracle", results["oracle"][kind]))
    return rows


def _headline(results: Mapping[str, Any]) -> Table:
    """Contexts, oracle and control by seen and unseen users; kinds without test pairs left out."""
    groups = []
    for kind in USER_KINDS:
        rows = _headline_rows(results, kind)
        shown = [
            [
                Cell(name),
                _percent(cell["accuracy_micro"]),
                _percent(cell["accuracy_macro"]),
                _percent(cell["accuracy_worst10"]),
                _cell(cell["nll"], ".3f"),
                _cell(cell["ece"], ".3f"),
            ]
            for name, cell in rows
            if cell["n_pairs"] > 0
        ]
        size = rows[0][1]
        title = f"{kind.capitalize()} users: {size['n_users']:,}, with {size['n_pairs']:,} pairs"
        groups.append((title, shown))
    columns = ["", "accuracy, %", "mean of users, %", "worst tenth, %", "nll, nats", "ECE"]
    return Table(columns, groups)


def _interval_note(results: Mapping[str, Any]) -> str:
    cells = [results["test"][kind]["user"] for kind in USER_KINDS]
    few = [cell["n_users"] for cell in cells if 0 < cell["n_users"] < FEW_USERS]
    note = (
        "In brackets: 95% intervals from a bootstrap over users with all their pairs. They say how "
        "far a figure would move with other users, not with other prompts or another seed. "
        "Accuracy is over pairs, ties one half; the worst tenth is of users. "
        f"Length only: {results['controls']['length_only'].get('rule', 'by tokens')}."
    )
    return note + (
        f" With only {' and '.join(map(str, few))} users these intervals are too narrow."
        if few
        else ""
    )


def _tiles(run: Run) -> list[Tile]:
    tiles = []
    for kind in USER_KINDS:
        personal, generic = run.outcomes(kind), run.outcomes(kind, "generic")
        if len(personal) == 0:
            continue
        cell = _percent(run.results["test"][kind]["user"]["accuracy_micro"])
        tiles.append(Tile(f"Accuracy, {kind} users", Cell(f"{cell.value}%", cell.interval)))
        if len(generic) > 0:
            gain = _points(paired_difference(personal, generic)["accuracy_micro"])
            tile = Tile(f"Over generic context, {kind}", Cell(f"{gain.value} pts", gain.interval))
            tiles.append(tile)
    return tiles


def _curves_section(path: Path) -> list[Section]:
    if not path.is_file():
        return []
    figures = _learning_curves(pd.read_csv(path))
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
    table = _key_table(results.get("data", {}), "count")
    note = "Rows read, refused by reason, truncated or dropped, and kept in each split."
    return [] if table is None else [Section("Data", note, table=table)]


def _provenance_sections(run: Run) -> list[Section]:
    table = _key_table(run.results.get("run", {}), "value")
    config = run.path / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    if table is None and text == "":
        return []
    return [Section("How it was made", table=table, text_name="config.yaml", text=text)]


def _key_table(tree: Mapping[str, Any], heading: str) -> Table | None:
    """A nested mapping as rows, grouped by its first keys where these hold mappings."""
    plain, groups = [], []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows = [[Cell(name), Cell(shown)] for name, shown in _flat(value)]
            groups.append((_words(key), rows))
        else:
            plain.append([Cell(_words(key)), Cell(_shown(value))])
    groups = [("", plain)] * (len(plain) > 0) + [group for group in groups if len(group[1]) > 0]
    texts = (0,) if heading == "count" else (0, 1)
    return Table(["", heading], groups, texts) if len(groups) > 0 else None


def _flat(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += [(f"{_words(key)} · {name}", shown) for name, shown in _flat(value)]
        else:
            rows.append((_words(key), _shown(value)))
    return rows


def _words(key: str) -> str:
    return key.replace("_", " ")


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# --- figures -------------------------------------------------------------------------------------


def _axes(width: float = 4.7, height: float = 3.0) -> tuple[Figure, Axes]:
    """An empty panel, in inches; two of the default width stand side by side on a page."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _drawing(figure: Figure, label: str, *, caption: str = "", wide: bool = False) -> Drawing:
    """The figure as inline SVG with the page's colours and fonts, ids made its own by the label."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height|version|xmlns|xmlns:xlink)="[^"]*"', "", svg, count=5)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for placeholder, role in ROLES.items():
        svg = svg.replace(placeholder, f"var(--{role})")
    prefix = re.sub(r"\W+", "-", label.lower())
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return Drawing(Markup(svg), caption, wide)  # matplotlib escapes what it writes


def _thinned(points: pd.DataFrame) -> pd.DataFrame:
    """At most CURVE_POINTS points [step, value], each the mean of its neighbours."""
    size = -(-len(points) // CURVE_POINTS)
    return points.groupby(np.arange(len(points)) // max(1, size)).mean()


@rc_context(STYLE)
def _learning_curves(metrics: pd.DataFrame) -> list[Drawing]:
    """Loss and accuracy of train and val by step, from the sparse rows of Lightning's CSVLogger."""
    drawings = []
    for title, pattern in (("Loss and nll, nats", r"loss|nll"), ("Accuracy", r"accuracy")):
        columns = [
            column
            for column in metrics.columns
            if re.match(rf"(train|val)/.*({pattern})", column) and metrics[column].notna().any()
        ]
        if len(columns) == 0:
            continue
        figure, axes = _axes()
        styles = {"train": iter("-:" * 9), "val": iter(("-", "--", "-.", ":") * 9)}
        for column in columns:
            split = column.split("/")[0]
            points = _thinned(metrics[["step", column]].dropna())
            colour, width = (MUTED, 1.0) if split == "train" else (ACCENT, 1.8)
            line: dict[str, Any] = {
                "color": colour,
                "linewidth": width,
                "linestyle": next(styles[split]),
            }
            marker = "o" if len(points) <= 30 else None
            axes.plot(
                points["step"], points[column], label=column, marker=marker, markersize=3, **line
            )
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.legend(labelcolor=INK)
        drawings.append(_drawing(figure, title))
    return drawings


def _user_figures(run: Run) -> list[Drawing]:
    kinds = [kind for kind in USER_KINDS if len(run.outcomes(kind)) > 0]
    bars = [_user_bars(run.outcomes(kind), kind) for kind in kinds]
    return [*bars, _seen_against_unseen(run.results), _reliability_diagram(run, kinds)]


@rc_context(STYLE)
def _user_bars(personal: Outcomes, kind: str) -> Drawing:
    """Each user's accuracy, sorted, the worst tenth marked; all bars in two paths, for 10,000."""
    sums = user_sums(personal)
    means = np.sort(sums.correct / sums.count) * 100
    n_worst = max(1, len(means) // 10)
    figure, axes = _axes(9.6, 2.4)
    gap = 0.2 if len(means) <= 150 else 0.0
    for start, stop, colour, name in (
        (0, n_worst, WARM, "worst tenth"),
        (n_worst, len(means), ACCENT, "other users"),
    ):
        if stop > start:
            heights = np.stack([means[start:stop], np.zeros(stop - start)], axis=1).ravel()
            places = np.arange(start, stop)
            edges = np.append(np.stack([places, places + 1 - gap], axis=1).ravel(), stop)
            axes.stairs(heights, edges, fill=True, color=colour, label=name, linewidth=0)
    mean = float(means.mean())
    axes.axhline(mean, color=INK, linewidth=1, linestyle="--", label=f"mean {mean:.1f}")
    axes.axhline(50, color=MUTED, linewidth=0.8)
    axes.set(xlim=(-0.5, len(means) + 0.5), ylim=(0, 100), ylabel="accuracy, %")
    axes.set_title(f"{kind.capitalize()} users, user context, from worst to best")
    axes.set_xticks([])
    axes.grid(visible=False, axis="x")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, ncols=3, labelcolor=INK)
    pairs = f"{sums.count.min():.0f} to {sums.count.max():.0f} pairs a user; the line is 50%."
    caption = f"{pairs} With few pairs a user, much of the spread is chance."
    return _drawing(figure, f"Accuracy of {kind} users", caption=caption, wide=True)


@rc_context(STYLE)
def _seen_against_unseen(results: Mapping[str, Any]) -> Drawing:
    """Micro accuracy with intervals, by context and kind of user."""
    names = [name for name, _ in _headline_rows(results, "seen")]
    figure, axes = _axes()
    for shift, kind in zip((-0.13, 0.13), USER_KINDS, strict=True):
        cells = [cell["accuracy_micro"] for _, cell in _headline_rows(results, kind)]
        _dots(axes, np.arange(len(names)) + shift, cells, kind)
    axes.axvline(50, color=MUTED, linewidth=0.8)
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, %")
    axes.set_title("Seen against unseen users, 95% intervals")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower right", ncols=2, labelcolor=INK)
    return _drawing(figure, "Seen against unseen users")


def _dots(axes: Axes, places: np.ndarray, cells: Sequence[Estimate], kind: str) -> None:
    shown = [
        (at, cell) for at, cell in zip(places, cells, strict=True) if cell["value"] is not None
    ]
    values = [100 * cell["value"] for _, cell in shown if cell["value"] is not None]
    for at, cell in shown:
        if cell["ci95"] is not None:
            low, high = cell["ci95"]
            axes.plot([100 * low, 100 * high], [at, at], color=KIND_COLOURS[kind], linewidth=1.6)
    marker: dict[str, Any] = {
        "marker": "o" if kind == "seen" else "D",
        "linestyle": "",
        "markersize": 5,
    }
    if len(values) > 0:
        at_all = [at for at, _ in shown]
        axes.plot(values, at_all, color=KIND_COLOURS[kind], label=f"{kind} users", **marker)


@rc_context(STYLE)
def _reliability_diagram(run: Run, kinds: Sequence[str]) -> Drawing:
    """Accuracy against confidence by bin, marker area by share of pairs (Guo et al. 2017)."""
    figure, axes = _axes()
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.8, linestyle="--", label="calibrated")
    for kind in kinds:
        confident, accurate, count = reliability(run.outcomes(kind))
        colour = KIND_COLOURS[kind]
        axes.plot(confident, accurate, color=colour, linewidth=1.2)
        marker = KIND_MARKERS[kind]
        area = 8 + 160 * count / count.sum()
        axes.scatter(
            confident,
            accurate,
            area,
            color=colour,
            marker=marker,
            alpha=0.75,
            label=f"{kind} users",
        )
    axes.set(xlabel="confidence, sigma(|margin|)", ylabel="accuracy")
    axes.set_title("Reliability, user context; area: share of pairs")
    legend = figure.legend(loc="outside lower right", ncols=3, labelcolor=INK)
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([24])  # type: ignore[union-attr]
    return _drawing(figure, "Reliability diagram")


@rc_context(STYLE)
def _comparison_bars(frame: pd.DataFrame) -> Drawing:
    """Micro accuracy of each run as bars from chance, 50%, with intervals."""
    figure, axes = _axes(9.6, 1.0 + 0.42 * len(frame))
    for shift, kind in zip((-0.2, 0.2), USER_KINDS, strict=True):
        columns = [f"{kind}_accuracy_micro{end}" for end in ("", "_low", "_high")]
        value, low, high = (100 * frame[column].to_numpy(dtype=float) for column in columns)
        places = np.arange(len(frame)) + shift
        axes.barh(
            places, value - 50, 0.36, left=50, color=KIND_COLOURS[kind], label=f"{kind} users"
        )
        axes.errorbar(
            value, places, xerr=[value - low, high - value], fmt="none", ecolor=INK, elinewidth=1
        )
    axes.axvline(50, color=MUTED, linewidth=0.8)
    axes.set_yticks(range(len(frame)), frame["run"], color=INK)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, %; bars start at chance, 50%")
    axes.grid(visible=False, axis="y")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, labelcolor=INK)
    return _drawing(figure, "Accuracy by run", wide=True)


# --- several runs --------------------------------------------------------------------------------


def _names(paths: Sequence[Path]) -> list[str]:
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


def _comparison_frame(runs: Sequence[Run]) -> pd.DataFrame:
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


def _comparison(frame: pd.DataFrame) -> tuple[Table, str]:
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
                _percent(_estimate_in(row, f"{kind}_accuracy_micro")),
                _percent(_estimate_in(row, f"{kind}_accuracy_macro")),
                _percent(_estimate_in(row, f"{kind}_accuracy_worst10")),
                _points(_estimate_in(row, f"{kind}_difference_micro")),
                _cell(_estimate_in(row, f"{kind}_gain_recovered"), "z.2f"),
            ]
            for _, row in frame.iterrows()
            if row[f"{kind}_n_pairs"] > 0
        ]
        groups.append((f"{kind.capitalize()} users", rows))
    measures = ["accuracy, %", "mean of users, %", "worst tenth, %", "over vanilla", "gain"]
    table = Table(["run", *varied, *measures], groups, tuple(range(1 + len(varied))))
    return table, "".join(f", {words}" for words in shared)


COMPARISON_NOTE = (
    "User context, in brackets 95% intervals over users. Over vanilla: accuracy less that of the "
    "run without user vectors (same model, seed and test pairs), in points, paired. Gain: share of "
    "what the oracle wins over vanilla; no interval where the oracle's own lead may be 0."
)


def _write_comparison(frame: pd.DataFrame, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "comparison.csv", index=False)
    table, shared = _comparison(frame)
    skipped = frame.attrs["skipped"]
    notes = [COMPARISON_NOTE]
    if len(skipped) > 0:
        notes.append(f"Skipped, as without results.json: {', '.join(skipped)}.")
    _write(out / "comparison.md", _markdown(table, "\n\n".join(notes)))
    figures = [_comparison_bars(frame)]
    sections = [Section("Test results", " ".join(notes), table=table, figures=figures)]
    subtitle = f"{len(frame)} rows{shared}"
    _write(out / "report.html", _page("Comparison of runs", subtitle, sections))


# --- pages ---------------------------------------------------------------------------------------


def _rich(table: Table, *, title: str, without: Sequence[str]) -> rich.table.Table:
    """The table for a narrow terminal: intervals under values, some columns left out."""
    kept = [place for place, column in enumerate(table.columns) if column not in without]
    shown = rich.table.Table(
        title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for place in kept:
        justify: Literal["left", "right"] = "left" if place in table.texts else "right"
        shown.add_column(table.columns[place], justify=justify)
    for name, rows in table.groups:
        if len(rows) > 0:
            shown.add_section()
            shown.add_row(Text(name, style="bold"))
        for row in rows:
            cells = [row[place] for place in kept]
            shown.add_row(*(Text(f"{cell.value}\n{cell.interval}".strip()) for cell in cells))
    return shown


def _markdown(table: Table, note: str) -> str:
    lines = ["# Comparison of runs", "", note]
    for name, rows in table.groups:
        if len(rows) > 0:
            rule = ["---" if at in table.texts else "---:" for at in range(len(table.columns))]
            cells = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
            body = [f"| {' | '.join(row)} |" for row in (table.columns, rule, *cells)]
            lines += ["", f"## {name}", "", *body]
    return "\n".join(lines) + "\n"


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
