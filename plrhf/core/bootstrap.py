"""Bootstrap over users: estimates with 95% intervals, p-values, and Holm's correction.

A statistic takes the weight of each user: how often the user was drawn in a resample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtr, stdtrit
from typing_extensions import TypedDict

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""A function of weights [R, U] that returns values [R].

Weight [r, u] is how often user u was drawn in resample r."""

N_RESAMPLES = 2000
N_PAIRED_RESAMPLES = 10_000  # p of many users reaches down to 0.0002, enough for Holm over 200
_BLOCK = 100_000  # weights drawn at once, 0.8 MB: they are read many times, so they stay in the CPU's cache
_MOST_KEPT = 2_000_000  # weights, 16 MB
_DRAWS_KEPT = 4


class Estimate(TypedDict):
    """A value with its 95% interval, as results.json holds it; None if undefined (JSON has no NaN)."""

    value: float | None
    ci95: list[float] | None


def bootstrap(
    statistics: Mapping[str, Statistic],
    *,
    n_users: int,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    alike: NDArray[np.int64] | None = None,
) -> dict[str, Estimate]:
    """Estimate each statistic with a 95% interval by resampling users.

    All statistics share the same resamples. The interval is the expanded percentile interval, see
    `tail_share`. It is None with fewer than two users, or if a resample gives no finite value.

    Args:
        alike: see `evaluate_on_resamples`.
    """
    values, samples = evaluate_on_resamples(
        statistics, n_users=n_users, n_resamples=n_resamples, seed=seed, alike=alike
    )
    return {name: estimate_of(values[name], samples[name], n_users) for name in statistics}


def evaluate_on_resamples(
    statistics: Mapping[str, Statistic],
    *,
    n_users: int,
    n_resamples: int,
    seed: int,
    alike: NDArray[np.int64] | None = None,
) -> tuple[dict[str, float], dict[str, Array]]:
    """Compute each statistic on all users, and on the same resamples, [R].

    Args:
        alike: how many users each of the statistics' weights stands for, [G]; None: one each. How
            often one of them is drawn is then multinomial, as if they had been drawn one by one.
    """
    everyone = np.ones(n_users) if alike is None else alike.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = {name: float(of(everyone[None])[0]) for name, of in statistics.items()}
        drawn = (
            _weights_of_blocks(n_users, n_resamples, seed)
            if alike is None
            else _weights_of_groups(alike, n_resamples, seed)
        )
        blocks = [[of(weights) for of in statistics.values()] for weights in drawn]
    samples = dict(zip(statistics, map(np.concatenate, zip(*blocks, strict=True)), strict=True))
    return values, samples


def _weights_of_blocks(n_users: int, n_resamples: int, seed: int) -> Iterator[Array]:
    """Return the blocks of `_resample_weights`; they are kept if they are not too large."""
    if n_resamples * n_users <= _MOST_KEPT:
        return iter(_kept_blocks(n_users, n_resamples, seed))
    return _resample_weights(n_users, n_resamples, seed)


def _weights_of_groups(alike: NDArray[np.int64], n_resamples: int, seed: int) -> Iterator[Array]:
    """Yield how often one of each group's users was drawn, in blocks [R', G].

    The naive twin is `_resample_weights`, summed over the users of each group.
    """
    generator = np.random.default_rng(seed)
    n_users = alike.sum()
    for rows in _block_sizes(len(alike), n_resamples):
        drawn = generator.multinomial(n_users, alike / n_users, size=rows)
        yield drawn.astype(np.float64)


@lru_cache(maxsize=_DRAWS_KEPT)
def _kept_blocks(n_users: int, n_resamples: int, seed: int) -> tuple[Array, ...]:
    """Draw the weights once for all models with the same number of users."""
    return tuple(_resample_weights(n_users, n_resamples, seed))


def _resample_weights(n_users: int, n_resamples: int, seed: int) -> Iterator[Array]:
    """Draw users with replacement, and yield how often each was drawn in blocks [R', U].

    The R' of all blocks add up to `n_resamples`.
    """
    generator = np.random.default_rng(seed)
    for rows in _block_sizes(n_users, n_resamples):
        drawn = generator.integers(n_users, size=(rows, n_users))
        drawn += n_users * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * n_users)
        yield weights.reshape(rows, n_users).astype(np.float64)


def _block_sizes(width: int, n_resamples: int) -> Iterator[int]:
    """Yield how many resamples of `width` weights each block has."""
    block = max(1, _BLOCK // width)
    for start in range(0, n_resamples, block):
        yield min(block, n_resamples - start)


def tail_share(n_users: int) -> float:
    """Return the share of resamples that lie beyond each end of a 95% interval.

    This is the expanded percentile interval (Hesterberg 2015, arXiv 1411.5279). The share is
    Phi(sqrt(n / (n - 1)) t), where t is the 0.025 quantile of Student's t with n - 1 degrees of
    freedom. It is below 0.025, most of all with few users, since plain percentiles give intervals
    that are too narrow: the standard deviation of resamples is too small by the factor
    sqrt((n - 1) / n), and their percentiles are normal ones rather than Student's.
    """
    return float(ndtr(np.sqrt(n_users / (n_users - 1)) * stdtrit(n_users - 1, 0.025)))


def p_value_of(share: float, n_users: int) -> float:
    """Return the two-sided p-value of a difference that has this share of resamples beyond 0.

    A share equal to `tail_share` gives 0.05, so the p-value and the interval agree.
    """
    return min(1.0, 2 * float(stdtr(n_users - 1, np.sqrt((n_users - 1) / n_users) * ndtri(share))))


def estimate_of(value: float, samples: Array, n_users: int) -> Estimate:
    """Make an estimate of a value and its resamples [R]; what is not finite becomes None."""
    interval = None
    if n_users > 1 and np.isfinite(samples).all():
        tail = tail_share(n_users)
        interval = [float(end) for end in np.quantile(samples, (tail, 1 - tail))]
    return {"value": value if np.isfinite(value) else None, "ci95": interval}


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for multiple testing by Holm's method (Holm 1979).

    The i-th smallest of m p-values becomes max over j <= i of (m - j + 1) p_j, but at most 1. A None
    stays None and does not count as a test.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted
