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


def fit_power_laws(sizes: Array, values: Array, errors: Array | None = None) -> list[PowerLaw]:
    """Fit a - b n^-c with a <= 1 by least squares: a and b in closed form for each of `RATES`.

    No model gains more than the oracle, so a is at most 1.

    Args:
        sizes: n, [N], of three sizes or more. values: the values at them of each curve, [C, N].
        errors: standard errors, by which points are weighted, [N]; None: all alike.
    """
    weights = np.ones_like(sizes) if errors is None else np.maximum(errors, 1e-9) ** -2.0
    weights = weights / weights.sum()
    shapes = -(sizes ** -RATES[:, None])  # [R, N]
    means, mean_shapes = values @ weights, shapes @ weights  # [C], [R]
    centred = weights * (shapes - mean_shapes[:, None])  # [R, N]
    drops = centred @ values.T / (centred * shapes).sum(axis=1)[:, None]  # [R, C]
    limits = means - drops * mean_shapes[:, None]
    at_most = (weights * shapes) @ (values - 1).T / (weights * shapes**2).sum(axis=1)[:, None]
    limits, drops = np.where(limits > 1, 1.0, limits), np.where(limits > 1, at_most, drops)
    found = limits[..., None] + drops[..., None] * shapes[:, None]  # [R, C, N]
    losses = np.where(drops < 0, np.inf, np.square(found - values) @ weights)
    best = losses.argmin(axis=0)
    return [
        PowerLaw(float(limits[rate, curve]), float(drops[rate, curve]), float(RATES[rate]))
        if losses[rate, curve] < np.inf
        else PowerLaw(float(means[curve]), 0.0, 1.0)  # no curve rises: a constant
        for curve, rate in enumerate(best)
    ]


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
    draws = np.random.default_rng(SEED).normal(values, errors, size=(DRAWS, len(values)))
    fit, *fits = fit_power_laws(n, np.vstack([values, draws]), errors)
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
