"""Figures of one run, and the bar chart that compares several runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes

from plrhf.core.bootstrap import Estimate
from plrhf.core.stats import Outcomes, as_text, reliability
from plrhf.evaluation.few_shot import FewShotCurve
from plrhf.evaluation.metrics import USER_KINDS
from plrhf.evaluation.results import Results
from plrhf.reporting.drawing import (
    ACCENT,
    INK,
    KIND_COLOURS,
    KIND_MARKERS,
    MUTED,
    SERIES,
    STYLE,
    WARM,
    Drawing,
    drawing,
    panel,
)
from plrhf.reporting.runs import Run
from plrhf.reporting.tables import headline_rows

MOST_BARS = 1000  # of users in a figure
N_LOWEST = 5  # users named under the bars
CURVE_POINTS = 300
LEARNED = {
    "Loss and nll, nats": r"loss|nll",
    "Accuracy": r"accuracy",
    "Reward and true preference": r"reward|true_preference",
    "KL to the reference, nats a response": r"kl",
    "Tokens a response": r"length",
}
"""Patterns of the metrics that are drawn together, by title."""


@rc_context(STYLE)
def learning_curves(metrics: pd.DataFrame) -> list[Drawing]:
    """Draw loss and accuracy of train and val by step, and what is logged of a policy's own responses.

    Args:
        metrics: the table of metrics.csv, in which most rows have only some of the metrics.
    """
    drawings = []
    for title, pattern in LEARNED.items():
        columns = [
            column
            for column in metrics.columns
            if re.match(rf"(train|val)/.*({pattern})", column) and metrics[column].notna().any()
        ]
        if len(columns) == 0:
            continue
        figure, axes = panel()
        styles = {"train": iter("-:" * 9), "val": iter(("-", "--", "-.", ":") * 9)}
        for column in columns:
            split = column.split("/")[0]
            points = _downsample(metrics[["step", column]].dropna())
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
        drawings.append(drawing(figure, title))
    return drawings


def _downsample(points: pd.DataFrame) -> pd.DataFrame:
    """Average neighbouring points [step, value] so that at most `CURVE_POINTS` are left."""
    size = -(-len(points) // CURVE_POINTS)
    return points.groupby(np.arange(len(points)) // max(1, size)).mean()


def user_bars(run: Run) -> list[Drawing]:
    """Draw the accuracy of each user, in one figure for each kind of user with test pairs."""
    kinds = [kind for kind in USER_KINDS if len(run.outcomes(kind)) > 0]
    return [_bars_of(run.outcomes(kind), kind) for kind in kinds]


def bars(heights: np.ndarray) -> np.ndarray:
    """Return sorted heights, or the means of `MOST_BARS` groups of neighbours where there are more."""
    if len(heights) <= MOST_BARS:
        return heights
    return np.array([part.mean() for part in np.array_split(heights, MOST_BARS)])


@rc_context(STYLE)
def _bars_of(personal: Outcomes, kind: str) -> Drawing:
    """Draw the accuracy of each user, sorted, with the worst tenth in another colour.

    All bars of a colour are one path. Of more than `MOST_BARS` users, a bar is the mean of some that are
    next to one another, so that any number of users makes a small figure.
    """
    sums = personal.sums
    own = sums.correct / sums.count * 100
    means = bars(np.sort(own))
    n_worst = max(1, len(means) // 10)
    figure, axes = panel(9.6, 2.4)
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
    mean = float(own.mean())
    axes.axhline(mean, color=INK, linewidth=1, linestyle="--", label=f"mean {mean:.1f}")
    axes.axhline(50, color=MUTED, linewidth=0.8)
    axes.set(xlim=(-0.5, len(means) + 0.5), ylim=(0, 100), ylabel="accuracy, %")
    axes.set_title(f"{kind.capitalize()} users, user context, from worst to best")
    axes.set_xticks([])
    axes.grid(visible=False, axis="x")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderpad=0, ncols=3, labelcolor=INK)
    fewest, most = (f"{end:.0f}" for end in (sums.count.min(), sums.count.max()))
    pairs = f"{fewest if fewest == most else f'{fewest} to {most}'} pairs a user"
    names = np.unique(as_text(personal.user_id))  # in the order of the sums
    lowest = ", ".join(f"{names[at]} {own[at]:.0f}" for at in own.argsort(kind="stable")[:N_LOWEST])
    if len(means) < len(own):
        pairs = (
            f"{len(own):,} users, a bar for some {round(len(own) / len(means))} of them, {pairs}"
        )
    caption = (
        f"{pairs}: with few, much of the spread is chance. The grey line is 50%. Lowest: {lowest}."
    )
    return drawing(figure, f"Accuracy of {kind} users", caption=caption, wide=True)


@rc_context(STYLE)
def seen_against_unseen(results: Results) -> Drawing:
    """Draw micro accuracy with intervals, by context and kind of user."""
    names = [name for name, _ in headline_rows(results, "seen")]
    figure, axes = panel()
    for shift, kind in zip((-0.13, 0.13), USER_KINDS, strict=True):
        cells = [cell["accuracy_micro"] for _, cell in headline_rows(results, kind)]
        _dots(axes, np.arange(len(names)) + shift, cells, kind)
    axes.axvline(50, color=MUTED, linewidth=0.8)
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, %")
    axes.set_title("Seen against unseen users, 95% intervals")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower right", ncols=2, labelcolor=INK)
    return drawing(figure, "Seen against unseen users")


def _dots(axes: Axes, places: np.ndarray, cells: Sequence[Estimate], kind: str) -> None:
    """Draw estimates as dots with intervals, each at its place on the vertical axis."""
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
def reliability_diagram(run: Run) -> Drawing:
    """Draw accuracy against confidence for each bin of confidence (Guo et al. 2017).

    The area of a marker is the share of pairs in its bin.
    """
    figure, axes = panel()
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.8, linestyle="--", label="calibrated")
    for kind in USER_KINDS:
        if len(run.outcomes(kind)) == 0:
            continue
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
    return drawing(figure, "Reliability diagram")


@rc_context(STYLE)
def comparison_bars(frame: pd.DataFrame, *, wide: bool = True) -> Drawing:
    """Draw the micro accuracy of each run, with intervals, as bars that start at chance (50%)."""
    figure, axes = panel(9.6 if wide else 5.6, 1.0 + 0.42 * len(frame))
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
    return drawing(figure, "Accuracy by run", wide=wide)


CURVES: dict[str, tuple[str, Any]] = {
    "adapted": (ACCENT, "-"),
    "random": (ACCENT, (0, (4, 2))),
    "pooled": (WARM, "--"),
    "other_user": (SERIES[2], (0, (1, 1))),
    "generic": (MUTED, "-."),
    "oracle": (INK, ":"),
}


@rc_context(STYLE)
def few_shot_curves(adapted: FewShotCurve, *, label: str = "Accuracy by pairs given") -> Drawing:
    """Draw the curves of adapt.json with 95% bands: accuracy by number of pairs of a new user."""
    figure, axes = panel(9.6, 3.2)
    places = np.arange(len(adapted.shots))
    for name, (colour, dashes) in CURVES.items():
        curve = adapted.curves.get(name)
        if curve is None:
            continue
        values, low, high = _percents(curve)
        axes.plot(
            places, values, color=colour, linestyle=dashes, marker="o", markersize=3.5, label=name
        )
        axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xticks(places, [str(shots) for shots in adapted.shots])
    axes.set(xlabel="pairs of the new user", ylabel="accuracy, %")
    axes.set_title(label)
    figure.legend(loc="outside lower right", ncols=5, labelcolor=INK)
    return drawing(figure, label, wide=True)


def _percents(curve: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the values and both ends of the intervals in per cent, NaN where there is none."""
    missing = [np.nan, np.nan]
    ends = [missing if one["ci95"] is None else one["ci95"] for one in curve]
    low, high = 100 * np.array(ends, dtype=float).reshape(-1, 2).T
    return 100 * np.array([one["value"] for one in curve], dtype=float), low, high
