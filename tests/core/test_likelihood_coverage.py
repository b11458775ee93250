"""The intervals of each likelihood hold the truth, in few simulations of the benchmark."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
from runs import ROOT

likelihoods: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks/likelihoods.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", likelihoods["STUDIES"])
def test_intervals_hold_the_truth_about_95_times_in_100(name: str) -> None:
    n_simulations = 20 if name == "temperature" else 50  # of 30 people each
    found = likelihoods["coverage"](name, n_simulations=n_simulations)
    for kind, share in found.items():  # of 50, a standard deviation of 0.03
        assert 0.88 <= share <= 1.0, kind
