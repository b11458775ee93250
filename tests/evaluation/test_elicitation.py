"""Which pair to ask next: the rules by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plrhf.evaluation.elicitation import Candidates, choose, information_gain, most_different

LOG2 = math.log(2)


def candidates(
    margins: list[float], variances: list[float], slopes: list[list[float]]
) -> Candidates:
    return Candidates(np.array(margins), np.array(slopes, dtype=float), np.array(variances))


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_an_answer_that_is_known_tells_nothing() -> None:
    gain = information_gain(np.array([0.0, 1.3, 40.0]), np.array([0.0, 0.0, 1.0]))
    np.testing.assert_allclose(gain, 0, atol=1e-9)


def test_a_small_variance_tells_what_a_logistic_design_says() -> None:
    """p (1 - p) v / 2: at a margin of log 3, p is 3/4, and v = 0.01 tells 3/16 * 0.01 / 2."""
    gain = information_gain(np.array([math.log(3)]), np.array([0.01]))
    np.testing.assert_allclose(gain, 3 / 16 * 0.01 / 2, rtol=0.01)


def test_the_gain_is_the_mutual_information() -> None:
    """A sum over a fine grid of the margin, by the definition H(E p) - E H(p)."""
    mean, variance = 0.7, 2.25
    grid = np.linspace(mean - 12, mean + 12, 4001)
    weight = np.exp(-((grid - mean) ** 2) / (2 * variance))
    weight /= weight.sum()
    p = 1 / (1 + np.exp(-grid))
    expected = entropy(float(weight @ p)) - float(
        sum(w * entropy(q) for w, q in zip(weight, p, strict=True))
    )
    np.testing.assert_allclose(
        information_gain(np.array([mean]), np.array([variance])), expected, rtol=2e-3
    )


def test_a_pair_about_which_nothing_is_known_tells_almost_a_bit() -> None:
    (gain,) = information_gain(np.array([0.0]), np.array([400.0]))
    assert 0.85 * LOG2 < gain < LOG2


def test_rules_differ_where_they_should() -> None:
    """A certain toss-up, an uncertain likely win, and an uncertain toss-up that is a bit off."""
    asked = candidates([0.0, 1.0, 0.3], [0.01, 4.0, 1.0], [[0.1, 0], [2, 0], [0, 1]])
    generator = np.random.default_rng(0)
    assert choose("uncertainty", asked, generator) == 0  # its answer is hardest to predict
    # p(1-p)v/2 would be 0.00125, 0.39 and 0.12.
    assert choose("information", asked, generator) == 1
    assert choose("variety", asked, generator) == 1  # the longest slope, as nothing was asked
    assert choose("variety", asked, generator, asked=np.array([[-3.0, 0.0]])) == 2
    drawn = {choose("random", asked, generator) for _ in range(40)}
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize(
    ("before", "expected"), [([[1, 0]], 2), ([[0, 1]], 0), ([[1, 0], [0, 1]], 1)]
)
def test_variety_takes_what_is_least_like_any_pair_asked(
    before: list[list[float]], expected: int
) -> None:
    slopes = np.array([[1.0, 0.1], [1.0, 1.0], [0.1, -1.0]])
    assert most_different(slopes, np.array(before, dtype=float)) == expected
