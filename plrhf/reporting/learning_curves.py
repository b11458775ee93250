"""Fits learning curves: how many pairs a user, or users, reach a share of the oracle's gain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from plrhf.core.bootstrap import Estimate
from plrhf.evaluation.metrics import USER_KINDS
from plrhf.reporting.comparison import estimate_in
from plrhf.reporting.curves import Family, curves
from plrhf.reporting.runs import Run
from plrhf.reporting.tables import Cell, Table, estimate_cell

Array = NDArray[np.float64]

SIZES = {
    "data.pairs_per_user": "pairs a user",
    "data.n_users": "users",
    "data.max_users": "users",
}
"""Settings whose curves are learning curves, and what they count."""

LEVEL = 0.9
RATES = np.geomspace(0.1, 3.0, 60)  # exponents that are tried
FURTHEST = 4  # how many times the largest size a fit is followed
DRAWS, SEED = 1000, 0
NOTE = (
    "The share of the oracle's gain over the vanilla run of the same size, fitted as a - b n^-c; the "
    f"size that reaches {LEVEL:.0%} of the gain; and the limit a. Brackets: 95% of fits to points drawn "
    f"from their own intervals, independently. A fit is followed to {FURTHEST} times the largest size, and "
    "'no' means that it does not get there."
)


class PowerLaw(NamedTuple):
    """The curve a - b n^-c, with b >= 0 and c > 0.

    Attributes:
        limit: a. drop: b. rate: c.
    """

    limit: float
    drop: float
    rate: float

    def at(self, sizes: Array) -> Array:
        """Return the curve's values at sizes n."""
        found: Array = self.limit - self.drop * sizes**-self.rate
        return found

    def size_at(self, level: float) -> float:
        """Return the smallest size whose value is `level`; infinity if there is none."""
        if self.limit <= level:
            return math.inf
        return float((self.drop / (self.limit - level)) ** (1 / self.rate))


def fit_power_law(sizes: Array, values: Array, errors: Array | None = None) -> PowerLaw:
    """Fit a - b n^-c with a <= 1 by least squares: a and b in closed form for each of `RATES`.

    No model gains more than the oracle, so a is at most 1.

    Args:
        sizes, values: n and the values at them, of three sizes or more.
        errors: standard errors, by which points are weighted; None: all alike.
    """
    weights = np.ones_like(values) if errors is None else 1 / np.maximum(errors, 1e-9)
    best, least = PowerLaw(float(np.average(values, weights=weights**2)), 0.0, 1.0), math.inf
    for rate in RATES:
        design = np.stack([np.ones_like(sizes), -(sizes**-rate)], axis=1)
        (limit, drop), *_ = np.linalg.lstsq(design * weights[:, None], values * weights, rcond=None)
        if limit > 1:
            limit, shape = 1.0, design[:, 1] * weights
            drop = shape @ ((values - 1) * weights) / (shape @ shape)
        if drop < 0:
            continue
        found = PowerLaw(float(limit), float(drop), float(rate))
        loss = float(np.square((found.at(sizes) - values) * weights).sum())
        if loss < least:
            best, least = found, loss
    return best


class LearningCurve(NamedTuple):
    """A fitted learning curve. The ends of intervals may be infinite.

    Attributes:
        limit: share of the gain that it levels off at. needed: size that reaches `LEVEL`.
    """

    fit: PowerLaw
    limit: Estimate
    needed: Estimate


def learning_curve(sizes: Sequence[float], gains: Sequence[Estimate]) -> LearningCurve | None:
    """Fit the share of the gain over sizes; None with fewer than three points that have an interval."""
    points = [
        (size, one["value"], (one["ci95"][1] - one["ci95"][0]) / (2 * 1.96))
        for size, one in zip(sizes, gains, strict=True)
        if one["value"] is not None and one["ci95"] is not None
    ]
    if len({size for size, *_ in points}) < 3:
        return None
    n, values, errors = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    fit = fit_power_law(n, values, errors)
    draws = np.random.default_rng(SEED).normal(values, errors, size=(DRAWS, len(values)))
    fits = [fit_power_law(n, one, errors) for one in draws]
    limits, needed = ([of(one) for one in fits] for of in (lambda f: f.limit, _needed))
    return LearningCurve(
        fit,
        {"value": fit.limit, "ci95": _interval(limits)},
        {"value": _needed(fit), "ci95": _interval(needed)},
    )


def _needed(fit: PowerLaw) -> float:
    return fit.size_at(LEVEL)


def _interval(values: Sequence[float]) -> list[float]:
    """Return the 2.5 and 97.5 percentiles, without interpolation, as values may be infinite."""
    low, high = np.quantile(np.array(values), [0.025, 0.975], method="closest_observation")
    return [float(low), float(high)]


def learning_curves_table(runs: Sequence[Run], frame: pd.DataFrame) -> Table | None:
    """Return a table of the learning curves of all runs; None if there are none.

    Args:
        runs: runs of `over_seeds`. frame: a table with a row for each, with its gain.
    """
    gains = {str(row["run"]): row for _, row in frame.iterrows()}
    groups = []
    for setting, families in curves(runs).items():
        if setting in SIZES:
            for kind in USER_KINDS:
                rows = list(_rows(families, kind, gains))
                groups.append((f"{SIZES[setting]}, {kind} users", rows))
    groups = [(name, rows) for name, rows in groups if len(rows) > 0]
    columns = ["runs", "sizes", f"size for {LEVEL:.0%} of the gain", "limit of the share", "c"]
    return Table(columns, groups, (0,)) if len(groups) > 0 else None


def _rows(
    families: Sequence[Family], kind: str, gains: Mapping[str, pd.Series]
) -> Iterator[list[Cell]]:
    """Yield a row for each family whose curve can be fitted."""
    for family in families:
        there = [(size, run) for size, run in family.runs if run.name in gains]
        of_runs = [estimate_in(gains[run.name], f"{kind}_gain_recovered") for _, run in there]
        found = learning_curve([size for size, _ in there], of_runs)
        if found is not None:
            sizes = [size for size, _ in there]
            yield [
                Cell(family.name),
                Cell(", ".join(f"{size:g}" for size in sizes)),
                Cell(_size_text(found.needed, most=FURTHEST * max(sizes))),
                estimate_cell(found.limit, "z.2f"),
                Cell(f"{found.fit.rate:.2f}"),
            ]


def _size_text(needed: Estimate, *, most: float) -> str:
    """Format a size and its interval; a size above `most` is "no"."""
    assert needed["value"] is not None and needed["ci95"] is not None
    value, low, high = (
        "no" if one > most else f"{one:.0f}" for one in (needed["value"], *needed["ci95"])
    )
    return f"{value} [{low}, {high}]"
