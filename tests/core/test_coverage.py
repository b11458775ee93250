"""The coverage benchmark: its truths by brute force, and the intervals it must find right."""

from __future__ import annotations

import runpy
from typing import Any

import numpy as np
import pytest
from runs import ROOT

coverage: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks/coverage.py"))


@pytest.mark.parametrize("world", coverage["WORLDS"])
def test_truths_are_what_many_users_give(world: str) -> None:
    true = coverage["truths"](world)
    for outcomes in coverage["evaluation"](world, 20_000, seed=5):
        users, place = np.unique(outcomes.user_id, return_inverse=True)
        means = np.bincount(place, outcomes.correct) / np.bincount(place)
        assert len(users) == 20_000
        assert means.mean() == pytest.approx(true["accuracy_macro"], abs=0.005)
        assert outcomes.correct.mean() == pytest.approx(true["accuracy_micro"], abs=0.005)
        counts = np.bincount(place)
        assert counts.min() >= 5 and counts.max() <= 200


@pytest.mark.slow
@pytest.mark.parametrize("world", coverage["WORLDS"])
def test_intervals_hold_the_truth_95_times_in_100(world: str) -> None:
    found = coverage["coverage"](world, n_simulations=400, n_users=100)
    for name in ("accuracy_micro", "accuracy_macro", "difference_micro", "difference_macro"):
        assert 0.92 <= found[name] <= 0.97, name
    assert 0.03 <= found["p_below_0.05"] <= 0.08
