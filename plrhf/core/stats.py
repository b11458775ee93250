"""Accuracy, likelihood and calibration of preference margins, with bootstrap intervals over users.

Choices of one user resemble one another, so rows are not independent draws: the resampled unit is
the user with all of their pairs (cluster bootstrap, Davison & Hinkley 1997, section 3.8).
Everything is computed from sums per user, never from rows, so 2000 resamples of thousands of users
take seconds. Intervals say how a figure would move with other users; not with other prompts or
seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtr, stdtrit
from typing_extensions import TypedDict

from plrhf.core.errors import bad_value

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""A function of weights [R, U] that returns values [R].

Weight [r, u] is how often user u was drawn in resample r."""

N_RESAMPLES = 2000
N_PAIRED_RESAMPLES = 10_000  # p of many users reaches down to 0.0002, enough for Holm over 200
N_BINS = 15
_BLOCK = 2_000_000  # weights held at once, 16 MB


class Estimate(TypedDict):
    """A value with its 95% interval, as results.json holds it; None if undefined (JSON has no NaN)."""

    value: float | None
    ci95: list[float] | None


@dataclass(frozen=True)
class Outcomes:
    """A model's margins on N pairs, and whether each was ranked right."""

    pair_id: NDArray[Any]  # [N]
    user_id: NDArray[Any]  # [N] who chose
    margin: Array  # [N] score of the chosen response less that of the rejected, in nats
    correct: Array  # [N] 1, 0, or 0.5 for a tie

    def __len__(self) -> int:
        return len(self.pair_id)


@dataclass(frozen=True)
class UserSums:
    """Sums over each user's pairs; every statistic is computed from them."""

    count: Array  # [U] pairs
    correct: Array  # [U] pairs ranked as the user did, ties one half
    nll: Array  # [U] sum of -log sigma(margin), in nats
    bin_gap: Array  # [U, N_BINS] sum of (correct - confidence) over the pairs in each bin

    @property
    def n_users(self) -> int:
        return len(self.count)


def correctness(margin: Array) -> Array:
    """Return 1 where the chosen response scored higher, 0 where it scored lower, 0.5 for a tie; [N]."""
    return 0.5 * (np.sign(margin) + 1.0)


def confidence(margin: Array) -> Array:
    """Return the predicted choice's probability under Bradley-Terry, sigma(|margin|), [N]."""
    return 1.0 / (1.0 + np.exp(-np.abs(margin)))


def confidence_bins(margin: Array) -> NDArray[np.int64]:
    """Return the bin of each confidence among the N_BINS equal bins ((m-1)/M, m/M] of (0, 1], [N]."""
    return np.ceil(confidence(margin) * N_BINS).astype(np.int64) - 1


def user_sums(outcomes: Outcomes) -> UserSums:
    """Return the sums over each user's pairs, users in sorted order.

    Raises:
        ValueError: a margin is not a finite number.
    """
    finite = np.isfinite(outcomes.margin)
    if not finite.all():
        worst = float(outcomes.margin[~finite][0])
        raise bad_value(
            "margin", worst, "finite numbers", "The model diverged: train with a lower optim.lr"
        )
    ids = as_text(outcomes.user_id).tolist()
    place = {name: number for number, name in enumerate(sorted(set(ids)))}
    user, n_users = np.array([place[name] for name in ids], np.int64), len(place)
    cell = user * N_BINS + confidence_bins(outcomes.margin)
    gap = outcomes.correct - confidence(outcomes.margin)
    return UserSums(
        count=_sums_by(user, np.ones(len(user)), n_users),
        correct=_sums_by(user, outcomes.correct, n_users),
        nll=_sums_by(user, np.logaddexp(0.0, -outcomes.margin), n_users),
        bin_gap=_sums_by(cell, gap, n_users * N_BINS).reshape(n_users, N_BINS),
    )


def _sums_by(place: NDArray[np.int64], values: Array, n_places: int) -> Array:
    return np.bincount(place, weights=values, minlength=n_places).astype(np.float64)


def accuracy_micro(sums: UserSums, weights: Array) -> Array:
    """Return the share of pairs ranked right in each resample, [R]."""
    return (weights @ sums.correct) / (weights @ sums.count)


def accuracy_macro(sums: UserSums, weights: Array) -> Array:
    """Return the mean of the users' own accuracies in each resample, [R]."""
    return (weights @ (sums.correct / sums.count)) / weights.sum(axis=1)


def accuracy_worst10(sums: UserSums, weights: Array) -> Array:
    """Return the mean accuracy of the worst tenth of the drawn users (at least one), [R].

    Chance puts users with few pairs among the worst, so it lies below what the worst tenth would
    get on many pairs: compare it between models on the same pairs, not between data sets.
    """
    means = sums.correct / sums.count
    order = np.argsort(means)
    n_worst = max(1, sums.n_users // 10)
    drawn = weights[:, order]
    drawn_before = np.cumsum(drawn, axis=1) - drawn
    taken = np.clip(n_worst - drawn_before, 0.0, drawn)
    return (taken @ means[order]) / n_worst


def nll(sums: UserSums, weights: Array) -> Array:
    """Return the mean of -log sigma(margin) over the pairs of each resample, [R], in nats."""
    return (weights @ sums.nll) / (weights @ sums.count)


def ece(sums: UserSums, weights: Array) -> Array:
    """Return the expected calibration error of each resample, [R].

    ECE = sum_m |B_m| / n * |acc(B_m) - conf(B_m)| over M = 15 equal bins of confidence
    (Guo et al. 2017, arXiv 1706.04599, eq. 3). Absolute values make it, and more so its resamples,
    too large on few pairs, so its interval may lie above a small value.
    """
    return np.abs(weights @ sums.bin_gap).sum(axis=1) / (weights @ sums.count)


STATISTICS: Mapping[str, Callable[[UserSums, Array], Array]] = {
    "accuracy_micro": accuracy_micro,
    "accuracy_macro": accuracy_macro,
    "accuracy_worst10": accuracy_worst10,
    "nll": nll,
    "ece": ece,
}
"""The statistics of a cell of results.json by name."""

ACCURACIES = ("accuracy_micro", "accuracy_macro", "accuracy_worst10")


def bootstrap(
    statistics: Mapping[str, Statistic],
    *,
    n_users: int,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return each statistic with its 95% interval over users.

    All statistics share the same resamples. The interval is the expanded percentile interval, see
    `tail_share`. It is None for fewer than two users and if a resample gives no finite value.
    """
    values, samples = _drawn(statistics, n_users=n_users, n_resamples=n_resamples, seed=seed)
    return {name: _estimate(values[name], samples[name], n_users) for name in statistics}


def _drawn(
    statistics: Mapping[str, Statistic], *, n_users: int, n_resamples: int, seed: int
) -> tuple[dict[str, float], dict[str, Array]]:
    """Return each statistic's value, and its values [R] on resamples that all statistics share."""
    with np.errstate(divide="ignore", invalid="ignore"):
        everyone = np.ones((1, n_users))
        values = {name: float(of(everyone)[0]) for name, of in statistics.items()}
        blocks = [
            [of(weights) for of in statistics.values()]
            for weights in _resamples(n_users, n_resamples, seed)
        ]
    samples = dict(zip(statistics, map(np.concatenate, zip(*blocks, strict=True)), strict=True))
    return values, samples


def _resamples(n_users: int, n_resamples: int, seed: int) -> Iterator[Array]:
    """Draw users with replacement; yield blocks of weights [R', U] until n_resamples are drawn."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // n_users)
    for start in range(0, n_resamples, block):
        rows = min(block, n_resamples - start)
        drawn = generator.integers(n_users, size=(rows, n_users))
        cells = (drawn + n_users * np.arange(rows)[:, None]).ravel()
        weights = np.bincount(cells, minlength=rows * n_users).reshape(rows, n_users)
        yield weights.astype(np.float64)


def tail_share(n_users: int) -> float:
    """Return the share of resamples that lie beyond each end of a 95% interval.

    It is below 0.025, and smaller for fewer users, as the percentile interval is too narrow then:

    Phi(sqrt(n / (n - 1)) t) with t the 0.025 quantile of Student's t of n - 1 degrees of freedom:
    resamples spread too little by the root, and percentiles are those of a normal distribution
    (Hesterberg 2015, arXiv 1411.5279, expanded percentile interval).
    """
    return float(ndtr(np.sqrt(n_users / (n_users - 1)) * stdtrit(n_users - 1, 0.025)))


def _p_value(share: float, n_users: int) -> float:
    """Return the two-sided p for the share of resamples on the other side of 0.

    A share of `tail_share` gives 0.05, so p and the interval agree.
    """
    return min(1.0, 2 * float(stdtr(n_users - 1, np.sqrt((n_users - 1) / n_users) * ndtri(share))))


def _estimate(value: float, samples: Array, n_users: int) -> Estimate:
    interval = None
    if n_users > 1 and np.isfinite(samples).all():
        tail = tail_share(n_users)
        interval = [float(end) for end in np.quantile(samples, (tail, 1 - tail))]
    return {"value": value if np.isfinite(value) else None, "ci95": interval}


def summarise_outcomes(
    outcomes: Outcomes,
    *,
    names: Sequence[str] = tuple(STATISTICS),
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Return a cell of results.json: the named statistics as estimates and the counts.

    Statistics that are not named are None.
    """
    estimates: dict[str, Any] = {name: {"value": None, "ci95": None} for name in STATISTICS}
    n_users = 0
    if len(outcomes) > 0:
        sums = user_sums(outcomes)
        n_users = sums.n_users
        statistics = {name: _on(sums, STATISTICS[name]) for name in names}
        estimates |= bootstrap(statistics, n_users=n_users, n_resamples=n_resamples, seed=seed)
    return {**estimates, "n_pairs": len(outcomes), "n_users": n_users}


def reliability(outcomes: Outcomes) -> tuple[Array, Array, Array]:
    """Return mean confidence, accuracy and number of pairs of each bin that is not empty."""
    bins = confidence_bins(outcomes.margin)
    count = _sums_by(bins, np.ones(len(bins)), N_BINS)
    held = count > 0
    confident = _sums_by(bins, confidence(outcomes.margin), N_BINS)
    correct = _sums_by(bins, outcomes.correct, N_BINS)
    return confident[held] / count[held], correct[held] / count[held], count[held]


def paired_difference(
    first: Outcomes,
    second: Outcomes,
    *,
    names: Sequence[str] = ("accuracy_micro", "accuracy_macro"),
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return the named statistics of the first minus those of the second on the same pairs.

    Both are resampled together, so that what makes a user easy for both does not widen the interval.

    Raises:
        ValueError: the two do not hold the same pairs of the same users, or hold none.
    """
    ours, theirs = _sums_of_same_pairs(first, second)
    statistics = {
        name: _difference(_on(ours, STATISTICS[name]), _on(theirs, STATISTICS[name]))
        for name in names
    }
    return bootstrap(statistics, n_users=ours.n_users, n_resamples=n_resamples, seed=seed)


class PairedTest(TypedDict):
    """How one model differs from another on the same pairs."""

    accuracy_micro: Estimate  # difference
    accuracy_macro: Estimate  # difference
    effect_size: Estimate  # mean over users of their difference, in standard deviations of it
    p_value: float | None  # of no difference in accuracy_micro, two-sided; None for one user


def paired_test(
    first: Outcomes, second: Outcomes, *, n_resamples: int = N_PAIRED_RESAMPLES, seed: int = 0
) -> PairedTest:
    """Test whether two models differ on the same pairs: differences, effect size and p-value.

    All come from the same resamples.

    p comes from the share of resampled differences on the other side of 0, counting one resample
    more (Davison & Hinkley 1997, eq. 4.11), and is below 0.05 where the interval excludes 0. The
    effect size is Cohen's d of paired values, d_z, over users.

    Raises:
        ValueError: the two do not hold the same pairs of the same users, or hold none.
    """
    ours, theirs = _sums_of_same_pairs(first, second)
    gaps = ours.correct / ours.count - theirs.correct / theirs.count
    statistics: dict[str, Statistic] = {
        name: _difference(_on(ours, STATISTICS[name]), _on(theirs, STATISTICS[name]))
        for name in ("accuracy_micro", "accuracy_macro")
    }
    statistics["effect_size"] = lambda weights: _mean_in_deviations(gaps, weights)
    n_users = ours.n_users
    values, samples = _drawn(statistics, n_users=n_users, n_resamples=n_resamples, seed=seed)
    estimates = {name: _estimate(values[name], samples[name], n_users) for name in statistics}
    drawn = samples["accuracy_micro"]
    beyond = 1 + min((drawn <= 0).sum(), (drawn >= 0).sum())
    return {
        "accuracy_micro": estimates["accuracy_micro"],
        "accuracy_macro": estimates["accuracy_macro"],
        "effect_size": estimates["effect_size"],
        "p_value": _p_value(min(0.5, beyond / (n_resamples + 1)), n_users) if n_users > 1 else None,
    }


def _mean_in_deviations(values: Array, weights: Array) -> Array:
    """Return mean over standard deviation of users' values [U] in each resample, [R].

    It is NaN if all values are equal.
    """
    count = weights.sum(axis=1)
    mean = (weights @ values) / count
    square = (weights @ values**2) / count
    variance = (square - mean**2) * count / (count - 1)
    deviation = np.sqrt(np.where(variance > 1e-12, variance, np.nan))
    return np.asarray(mean / deviation)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values for how many tests are made, by Holm's method; None stays None, uncounted.

    The i-th smallest of m becomes the largest of (m - j + 1) p_j, j <= i, at most 1 (Holm 1979).
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted


def gain_recovered(
    personal: Outcomes,
    vanilla: Outcomes,
    oracle: Outcomes,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return the share of the possible gain that was won: (personal - vanilla) / (oracle - vanilla).

    All three are micro accuracies.

    The interval is None where that of the possible gain o - v reaches down to 0, since the ratio
    is then unbounded (Fieller 1954); the value is None where there is no gain to win.

    Raises:
        ValueError: the three do not hold the same pairs of the same users, or hold none.
    """
    sums = _sums_of_same_pairs(personal, vanilla, oracle)
    p, v, o = (_on(one, accuracy_micro) for one in sums)
    won, possible = _difference(p, v), _difference(o, v)
    estimates = bootstrap(
        {"recovered": lambda weights: won(weights) / possible(weights), "possible": possible},
        n_users=sums[0].n_users,
        n_resamples=n_resamples,
        seed=seed,
    )
    most, bounds = estimates["possible"]["value"], estimates["possible"]["ci95"]
    return {
        "value": None if most is None or most <= 0 else estimates["recovered"]["value"],
        "ci95": None if bounds is None or bounds[0] <= 0 else estimates["recovered"]["ci95"],
    }


def as_text(values: NDArray[Any]) -> NDArray[np.object_]:
    """Return ids as Python texts, [N].

    NumPy's own text arrays give every id the width of the longest: one of 10,000 characters among
    20,000 pairs would take 0.8 GB an array.
    """
    return np.array([*map(str, values.tolist()), None], dtype=object)[:-1]


def same_pairs(first: Outcomes, second: Outcomes) -> bool:
    """Return whether both hold the same pairs of the same users, in any order."""
    in_one_order = all(
        np.array_equal(getattr(first, name), getattr(second, name))
        for name in ("pair_id", "user_id")
    )
    return in_one_order or _keys(first) == _keys(second)


def _keys(outcomes: Outcomes) -> list[tuple[str, str]]:
    pairs, users = as_text(outcomes.pair_id), as_text(outcomes.user_id)
    return sorted(zip(pairs.tolist(), users.tolist(), strict=True))


def _sums_of_same_pairs(first: Outcomes, *others: Outcomes) -> list[UserSums]:
    """Return each one's sums over users; raise unless all hold the same pairs."""
    for other in others:
        if len(first) == 0 or not same_pairs(first, other):
            shared = len(set(_keys(first)) & set(_keys(other)))
            raise bad_value(
                "pairs",
                f"{shared} shared of {len(first)} and {len(other)}",
                "two tables that hold the same pairs of the same users, at least one",
                "Evaluate both runs on the same data, splits and seed",
            )
    return [user_sums(one) for one in (first, *others)]


def _on(sums: UserSums, statistic: Callable[[UserSums, Array], Array]) -> Statistic:
    return lambda weights: statistic(sums, weights)


def _difference(first: Statistic, second: Statistic) -> Statistic:
    return lambda weights: first(weights) - second(weights)
