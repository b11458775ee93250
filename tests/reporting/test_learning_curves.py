"""Learning curves: known power laws are found again, and the size they need is worked by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_over_seeds import made
from test_report import ORACLE, PERSONAL, VANILLA

from plrhf.reporting.comparison_page import compare
from plrhf.reporting.learning_curves import RATES, PowerLaw, fit_power_laws, learning_curve

SIZES = np.array([5.0, 10.0, 20.0, 40.0, 80.0])


def around(values: Any, half: float) -> Any:
    return [{"value": one, "ci95": [one - half, one + half]} for one in values]


def test_the_size_that_is_needed_by_hand() -> None:
    assert PowerLaw(1.0, 2.0, 0.5).size_at(0.9) == pytest.approx(400)  # 2 / sqrt(400) = 0.1
    assert PowerLaw(1.0, 2.0, 1.0).at(np.array([4.0])) == pytest.approx(0.5)
    assert PowerLaw(0.9, 2.0, 1.0).size_at(0.9) == math.inf


@pytest.mark.parametrize(("limit", "drop", "rate"), [(0.97, 2.0, 0.9), (1.0, 0.8, 0.3)])
def test_a_power_law_is_found_again(limit: float, drop: float, rate: float) -> None:
    truth = PowerLaw(limit, drop, rate)
    found = fit_power_laws(SIZES, truth.at(SIZES)[None])[0]
    assert found.rate == pytest.approx(rate, rel=0.06)  # the grid's step
    assert np.abs(found.at(SIZES) - truth.at(SIZES)).max() < 0.01


def test_many_fits_at_once_are_those_of_lstsq() -> None:
    draws = np.random.default_rng(0)
    values, errors = draws.uniform(0.3, 0.9, (20, len(SIZES))), draws.uniform(0.01, 0.1, len(SIZES))
    fits = fit_power_laws(SIZES, values, errors)
    for fit, one in zip(fits, values, strict=True):
        losses = [naive_fit(rate, one, errors)[2] for rate in RATES]
        limit, drop, _ = naive_fit(RATES[int(np.argmin(losses))], one, errors)
        rate = RATES[int(np.argmin(losses))] if min(losses) < math.inf else 1.0
        assert fit == pytest.approx((limit, drop, rate))
    assert 0 < sum(fit.drop == 0 for fit in fits) < len(fits)  # some values fall


def naive_fit(rate: float, values: Any, errors: Any) -> tuple[float, float, float]:
    """Limit, drop and weighted loss of the fit with one rate; loss infinite where the curve falls."""
    design = np.stack([np.ones_like(SIZES), -(SIZES**-rate)], axis=1) / errors[:, None]
    limit, drop = np.linalg.lstsq(design, values / errors, rcond=None)[0]
    if limit > 1:
        limit = 1.0
        drop = np.linalg.lstsq(design[:, 1:], (values - 1) / errors, rcond=None)[0][0]
    if drop < 0:
        return float(np.average(values, weights=errors**-2.0)), 0.0, math.inf
    return limit, drop, float(np.square(design @ [limit, drop] - values / errors).sum())


def test_intervals_hold_the_truth_and_grow_with_the_noise() -> None:
    truth = PowerLaw(1.0, 2.0, 1.0)  # 90% at 20
    wide, narrow = (learning_curve(SIZES, around(truth.at(SIZES), h)) for h in (0.05, 0.005))
    assert wide is not None and narrow is not None
    widths = []
    for one in (wide, narrow):
        low, high = one.needed["ci95"] or (0.0, 0.0)
        assert low < 20 < high and one.needed["value"] == pytest.approx(20, rel=0.1)
        widths.append(high - low)
    assert widths[1] < widths[0] / 4
    flat = learning_curve(SIZES, around([0.5] * 5, 0.01))
    assert flat is not None and flat.needed["value"] == math.inf
    assert learning_curve(SIZES[:2], around([0.5, 0.6], 0.01)) is None
    no_interval = [{"value": 0.5, "ci95": None}]
    assert learning_curve(SIZES[:3], [*around([0.5, 0.6], 0.01), *no_interval]) is None


@pytest.mark.slow
def test_a_comparison_has_learning_curves(tmp_path: Path) -> None:
    half = {user: (n + VANILLA[user]) // 2 for user, n in ORACLE.items()}
    for size, right in ((5, VANILLA), (10, half), (20, PERSONAL), (40, ORACLE)):
        made(tmp_path / "runs", right, 1, "lookup", data_pairs_per_user=size)
        made(tmp_path / "runs", VANILLA, 1, "none", data_pairs_per_user=size)
    compare(str(tmp_path / "runs" / "*"), tmp_path / "out")
    text = (tmp_path / "out" / "learning_curves.md").read_text()
    assert "pairs a user, seen users" in text and "5, 10, 20, 40" in text
    assert "Learning curves" in (tmp_path / "out" / "report.html").read_text()
    compare([tmp_path / "runs" / "none-5-1"], tmp_path / "one")
    assert not (tmp_path / "one" / "learning_curves.md").exists()
