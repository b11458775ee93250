"""Draws accuracy over the numeric settings that a set of runs varies, such as alpha.

There is no list of such settings. Any number in which otherwise equal runs differ becomes an axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes

from plrhf.core.components import WITHOUT_EFFECT
from plrhf.evaluation.metrics import USER_KINDS, UserKind
from plrhf.reporting.drawing import INK, MUTED, SERIES, STYLE, Drawing, drawing, panel
from plrhf.reporting.runs import SETTINGS, Run

NOT_TRAINED = (*WITHOUT_EFFECT, "samples")
WIDE_RANGE = 8  # from this ratio on an axis is logarithmic


class Family(NamedTuple):
    """Runs that differ in one setting and in seed alone: the points of one curve."""

    name: str
    runs: Sequence[tuple[float, Run]]  # (value of the setting, run)


def sweep_curves(runs: Sequence[Run]) -> list[Drawing]:
    """Draw accuracy over each varied setting, for each kind of user that has test pairs."""
    drawings = []
    for setting, families in curves(runs).items():
        for kind in USER_KINDS:
            if any(len(run.outcomes(kind)) > 0 for one in families for _, run in one.runs):
                drawings.append(_curve(setting, families, kind))
    return drawings


def curves(runs: Sequence[Run]) -> dict[str, list[Family]]:
    """Find the numeric settings with several values, and group the runs into curves over each.

    Returns:
        The families of runs by the setting's dotted name.
    """
    flat = [flattened(run.config) for run in runs]
    names = sorted({name for settings in flat for name in settings})
    varied = [name for name in names if len({settings.get(name) for settings in flat}) > 1]
    found: dict[str, list[Family]] = {}
    for axis in varied:
        groups: dict[tuple[Any, ...], list[tuple[float, int]]] = {}
        for number, settings in enumerate(flat):
            value = settings.get(axis)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = tuple(settings.get(name) for name in varied if name != axis)
                groups.setdefault(rest, []).append((float(value), number))
        curved = [group for group in groups.values() if len({value for value, _ in group}) > 1]
        if len(curved) > 0:
            labels = _labels([runs[group[0][1]] for group in curved], axis)
            found[axis] = [
                Family(label, [(value, runs[number]) for value, number in sorted(group)])
                for label, group in zip(labels, curved, strict=True)
            ]
    return found


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings that affect training as one flat dict, by dotted name, lists as text."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if name == "seed" or (prefix == "" and name in NOT_TRAINED):
            continue
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value) if isinstance(value, list) else value
    return flat


def _labels(first: Sequence[Run], axis: str) -> list[str]:
    """Return a distinct label for each family.

    A label has the names of the parts that differ, and then as many single settings as are needed to
    make all labels distinct. Where settings do not suffice, the label is the name of the first run.

    Args:
        first: the first run of each family. axis: the setting that the families vary.
    """
    if len(first) == 1:
        return ["user context"]
    keys = [key for key in SETTINGS if key != "seed"]
    told = [key for key in keys if len({run.settings[key] for run in first}) > 1]
    parts = [[run.settings[key] for key in told] for run in first]
    flat = [flattened(run.config) for run in first]
    for name in dict.fromkeys(name for settings in flat for name in settings):
        labels = [", ".join(words) for words in parts]
        if len(set(labels)) == len(labels):
            return labels
        twins: dict[str, set[Any]] = {}
        for label, settings in zip(labels, flat, strict=True):
            twins.setdefault(label, set()).add(settings.get(name))
        if name != axis and any(len(values) > 1 for values in twins.values()):
            for words, settings in zip(parts, flat, strict=True):
                words.append(f"{name}={settings.get(name)}")
    labels = [", ".join(words) for words in parts]
    return labels if len(set(labels)) == len(labels) else [run.name for run in first]


@rc_context(STYLE)
def _curve(setting: str, families: Sequence[Family], kind: UserKind) -> Drawing:
    """Draw a curve for each family: a line of means over seeds, and a mark for each run.

    The curve of the generic context is dashed.
    """
    figure, axes = panel()
    for number, family in enumerate(families):
        colour = SERIES[number % len(SERIES)]
        _line(axes, family, kind, "user", color=colour, label=family.name)
        own = MUTED if len(families) == 1 else colour
        label = "generic context" if number == 0 else None
        _line(axes, family, kind, "generic", color=own, linestyle="--", label=label)
    values = [value for family in families for value, _ in family.runs]
    if min(values) > 0 and max(values) / min(values) >= WIDE_RANGE:
        axes.set_xscale("log")
        axes.minorticks_off()
    ticks = sorted(set(values))
    if len(ticks) <= 10:
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.set(xlabel=setting, ylabel="accuracy, %")
    axes.set_title(f"{kind.capitalize()} users by {setting}")
    figure.legend(loc="outside lower right", ncols=2, labelcolor=INK)
    return drawing(figure, f"{setting} and {kind} users")


def _line(
    axes: Axes,
    family: Family,
    kind: UserKind,
    context: Literal["user", "generic"],
    **style: Any,
) -> None:
    """Draw one curve of micro accuracy, with an interval at values that have a single run."""
    held = [
        (value, run.results.test[kind][context]["accuracy_micro"])
        for value, run in family.runs
        if run.results.test[kind][context]["n_pairs"] > 0
    ]
    values = sorted({value for value, _ in held})
    by_value = {value: [cell for at, cell in held if at == value] for value in values}
    means = [100 * np.mean([cell["value"] or 0.0 for cell in by_value[value]]) for value in values]
    axes.plot(values, means, linewidth=1.6, **style)
    colour = style["color"]
    axes.plot(
        [at for at, _ in held],
        [100 * (cell["value"] or 0.0) for _, cell in held],
        "o",
        color=colour,
        markersize=3.5,
    )
    for value, cells in by_value.items():
        if len(cells) == 1 and cells[0]["ci95"] is not None and context == "user":
            low, high = cells[0]["ci95"]
            axes.plot([value, value], [100 * low, 100 * high], color=colour, linewidth=1)
