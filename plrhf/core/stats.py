"""Accuracy, likelihood and calibration of preference margins, with bootstrap intervals over users.

The choices of one user are correlated, so pairs are not independent draws. The resampled unit is
therefore the user with all of their pairs (cluster bootstrap, Davison & Hinkley 1997, section 3.8).
Every statistic is computed from sums per user, which makes 2000 resamples of thousands of users a
matter of seconds. An interval covers the choice of users. It does not cover the choice of prompts
or seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from plrhf.core.bootstrap import (
    N_PAIRED_RESAMPLES,
    N_RESAMPLES,
    Array,
    Estimate,
    Statistic,
    bootstrap,
    estimate_of,
    evaluate_on_resamples,
    p_value_of,
)
from plrhf.core.errors import bad_value

N_BINS = 15
MANY_USERS = 10_000  # from so many users on, those who are alike are drawn together


@dataclass(frozen=True)
class Outcomes:
    """The margins of a model on N pairs, and whether the model ranked each pair correctly."""

    pair_id: NDArray[Any]  # [N]
    user_id: NDArray[Any]  # [N] who chose
    margin: Array  # [N] score of the chosen response minus that of the rejected one, in nats
    correct: Array  # [N] 1, 0, or 0.5 for a tie

    def __len__(self) -> int:
        return len(self.pair_id)

    @cached_property
    def sums(self) -> UserSums:
        """The sums over each user's pairs, see `user_sums`; computed once."""
        return user_sums(self)


@dataclass(frozen=True)
class UserSums:
    """Sums over the pairs of each user. Every statistic is computed from these sums."""

    count: Array  # [U] pairs
    correct: Array  # [U] pairs ranked correctly; a tie counts one half
    nll: Array  # [U] sum of -log sigma(margin), in nats
    bin_gap: Array  # [U, N_BINS] sum of (correct - confidence) over the pairs in each bin

    @property
    def n_users(self) -> int:
        return len(self.count)

    @cached_property
    def accuracy(self) -> Array:
        """The accuracy on each user's pairs, [U]."""
        return self.correct / self.count

    @cached_property
    def order(self) -> NDArray[np.intp]:
        """The places of the users, sorted by accuracy, the worst first, [U]."""
        return np.argsort(self.accuracy)


def correctness(margin: Array) -> Array:
    """Return 1 where the chosen response scored higher, 0 where it scored lower, 0.5 for a tie; [N]."""
    return 0.5 * (np.sign(margin) + 1.0)


def confidence(margin: Array) -> Array:
    """Return the probability of the predicted choice under Bradley-Terry, sigma(|margin|), [N]."""
    return 1.0 / (1.0 + np.exp(-np.abs(margin)))


def confidence_bins(margin: Array) -> NDArray[np.int64]:
    """Return the index of the bin that holds the confidence of each margin, [N].

    The bins are the M = N_BINS intervals ((m - 1) / M, m / M] of (0, 1], numbered from 0.

    Raises:
        ValueError: a margin is not a finite number. As an index it would let NumPy write beside an array.
    """
    finite = np.isfinite(margin)
    if not finite.all():
        cure = "The model diverged: train with a lower optim.lr"
        raise bad_value("margin", float(margin[~finite][0]), "finite numbers", cure)
    return np.ceil(confidence(margin) * N_BINS).astype(np.int64) - 1


def user_sums(outcomes: Outcomes) -> UserSums:
    """Sum count, correctness, likelihood and calibration gap over the pairs of each user.

    Users are sorted by id.

    Raises:
        ValueError: a margin is not a finite number.
    """
    ids = as_text(outcomes.user_id).tolist()
    place = {name: number for number, name in enumerate(sorted(set(ids)))}
    user, n_users = np.array([place[name] for name in ids], np.int64), len(place)
    cell = user * N_BINS + confidence_bins(outcomes.margin)
    gap = outcomes.correct - confidence(outcomes.margin)
    return UserSums(
        count=_sum_by_index(user, np.ones(len(user)), n_users),
        correct=_sum_by_index(user, outcomes.correct, n_users),
        nll=_sum_by_index(user, np.logaddexp(0.0, -outcomes.margin), n_users),
        bin_gap=_sum_by_index(cell, gap, n_users * N_BINS).reshape(n_users, N_BINS),
    )


def _sum_by_index(index: NDArray[np.int64], values: Array, n: int) -> Array:
    """Sum the values that share an index in 0 .. n - 1, [N] -> [n]."""
    return np.bincount(index, weights=values, minlength=n).astype(np.float64)


def accuracy_micro(sums: UserSums, weights: Array) -> Array:
    """Return the share of pairs that are ranked correctly in each resample, [R]."""
    return (weights @ sums.correct) / (weights @ sums.count)


def accuracy_macro(sums: UserSums, weights: Array) -> Array:
    """Return the mean over users of the accuracy on each user's pairs, in each resample, [R]."""
    return (weights @ sums.accuracy) / weights.sum(axis=1)


def accuracy_worst10(sums: UserSums, weights: Array) -> Array:
    """Return the mean accuracy of the worst tenth of the drawn users (at least one user), [R].

    A user with few pairs is among the worst more often by chance, so the value is biased downwards.
    Compare it between models on the same pairs, not between data sets.
    """
    n_worst = max(1, sums.n_users // 10)
    drawn = weights[:, sums.order]
    drawn_before = np.cumsum(drawn, axis=1) - drawn
    taken = np.clip(n_worst - drawn_before, 0.0, drawn)
    return (taken @ sums.accuracy[sums.order]) / n_worst


def nll(sums: UserSums, weights: Array) -> Array:
    """Return the mean of -log sigma(margin) over the pairs of each resample, [R], in nats."""
    return (weights @ sums.nll) / (weights @ sums.count)


def ece(sums: UserSums, weights: Array) -> Array:
    """Return the expected calibration error of each resample, [R].

    ECE = sum_m |B_m| / n * |acc(B_m) - conf(B_m)| over M = 15 equal bins of confidence
    (Guo et al. 2017, arXiv 1706.04599, eq. 3). On few pairs the absolute values bias it upwards, and
    its resamples even more. A small ECE may therefore lie below its own interval.
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
OF_COUNTS = {"accuracy_micro", "accuracy_macro"}
"""Statistics that depend on counts of pairs and of correct ones alone, and not on the number of users."""


def summarise_outcomes(
    outcomes: Outcomes,
    *,
    names: Sequence[str] = tuple(STATISTICS),
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Return one cell of results.json: estimates of the named statistics, and the counts.

    The values of statistics that are not named are None.
    """
    estimates: dict[str, Any] = {name: {"value": None, "ci95": None} for name in STATISTICS}
    n_users = 0
    if len(outcomes) > 0:
        sums = outcomes.sums
        n_users = sums.n_users
        statistics = {name: _statistic_of(sums, STATISTICS[name]) for name in names}
        estimates |= bootstrap(statistics, n_users=n_users, n_resamples=n_resamples, seed=seed)
    return {**estimates, "n_pairs": len(outcomes), "n_users": n_users}


def reliability(outcomes: Outcomes) -> tuple[Array, Array, Array]:
    """Return mean confidence, accuracy and number of pairs for each bin that is not empty."""
    bins = confidence_bins(outcomes.margin)
    count = _sum_by_index(bins, np.ones(len(bins)), N_BINS)
    occupied = count > 0
    confident = _sum_by_index(bins, confidence(outcomes.margin), N_BINS)
    correct = _sum_by_index(bins, outcomes.correct, N_BINS)
    mean_confidence, accuracy = (
        confident[occupied] / count[occupied],
        correct[occupied] / count[occupied],
    )
    return mean_confidence, accuracy, count[occupied]


def paired_difference(
    first: Outcomes,
    second: Outcomes,
    *,
    names: Sequence[str] = ("accuracy_micro", "accuracy_macro"),
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Estimate the named statistics of the first model minus those of the second on the same pairs.

    Both models are resampled together, so users who are easy for both do not widen the interval.

    Raises:
        ValueError: the two do not hold the same pairs of the same users, or hold no pairs.
    """
    ours, theirs = _sums_of_same_pairs(first, second)
    n_users, alike = ours.n_users, None
    if set(names) <= OF_COUNTS:
        (ours, theirs), alike = _joined([ours, theirs])
    statistics = {name: _difference_of(ours, theirs, STATISTICS[name]) for name in names}
    return bootstrap(statistics, n_users=n_users, n_resamples=n_resamples, seed=seed, alike=alike)


class PairedTest(TypedDict):
    """The differences of two models on the same pairs, and how significant they are."""

    accuracy_micro: Estimate  # difference
    accuracy_macro: Estimate  # difference
    effect_size: Estimate  # mean difference over users, divided by its standard deviation
    p_value: float | None  # of no difference in accuracy_micro, two-sided; None for one user


def paired_test(
    first: Outcomes, second: Outcomes, *, n_resamples: int = N_PAIRED_RESAMPLES, seed: int = 0
) -> PairedTest:
    """Test whether two models differ on the same pairs: differences, effect size and p-value.

    All of these come from the same resamples. The p-value is computed from the share of resampled
    differences beyond 0, with one resample added (Davison & Hinkley 1997, eq. 4.11). It is below
    0.05 where the interval excludes 0. The effect size is Cohen's d_z over users.

    Raises:
        ValueError: the two do not hold the same pairs of the same users, or hold no pairs.
    """
    ours, theirs = _sums_of_same_pairs(first, second)
    n_users = ours.n_users
    (ours, theirs), alike = _joined([ours, theirs])
    gaps = ours.accuracy - theirs.accuracy
    statistics: dict[str, Statistic] = {
        name: _difference_of(ours, theirs, STATISTICS[name])
        for name in ("accuracy_micro", "accuracy_macro")
    }
    statistics["effect_size"] = lambda weights: _effect_size(gaps, weights)
    values, samples = evaluate_on_resamples(
        statistics, n_users=n_users, n_resamples=n_resamples, seed=seed, alike=alike
    )
    estimates = {name: estimate_of(values[name], samples[name], n_users) for name in statistics}
    drawn = samples["accuracy_micro"]
    beyond = 1 + min((drawn <= 0).sum(), (drawn >= 0).sum())
    return {
        "accuracy_micro": estimates["accuracy_micro"],
        "accuracy_macro": estimates["accuracy_macro"],
        "effect_size": estimates["effect_size"],
        "p_value": p_value_of(min(0.5, beyond / (n_resamples + 1)), n_users)
        if n_users > 1
        else None,
    }


def _effect_size(values: Array, weights: Array) -> Array:
    """Divide the mean of the users' values [U] by their standard deviation in each resample, [R].

    The result is NaN if all values are equal.
    """
    count = weights.sum(axis=1)
    mean = (weights @ values) / count
    square = (weights @ values**2) / count
    variance = (square - mean**2) * count / (count - 1)
    deviation = np.sqrt(np.where(variance > 1e-12, variance, np.nan))
    return np.asarray(mean / deviation)


def gain_recovered(
    personal: Outcomes,
    vanilla: Outcomes,
    oracle: Outcomes,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Estimate the share of the possible gain that the personalised model reaches.

    The share is (personal - vanilla) / (oracle - vanilla), all three as micro accuracies. Its value
    is None if the oracle is no better than the vanilla model. Its interval is None if the interval of
    oracle - vanilla includes 0, since the ratio is then unbounded (Fieller 1954).

    Raises:
        ValueError: the three do not hold the same pairs of the same users, or hold no pairs.
    """
    sums = _sums_of_same_pairs(personal, vanilla, oracle)
    (p, v, o), alike = _joined(sums)
    won, possible = (_difference_of(one, v, accuracy_micro) for one in (p, o))
    estimates = bootstrap(
        {"recovered": lambda weights: won(weights) / possible(weights), "possible": possible},
        n_users=sums[0].n_users,
        n_resamples=n_resamples,
        seed=seed,
        alike=alike,
    )
    most, bounds = estimates["possible"]["value"], estimates["possible"]["ci95"]
    return {
        "value": None if most is None or most <= 0 else estimates["recovered"]["value"],
        "ci95": None if bounds is None or bounds[0] <= 0 else estimates["recovered"]["ci95"],
    }


def as_text(values: NDArray[Any]) -> NDArray[np.object_]:
    """Return ids as an array of Python strings, [N] object.

    A NumPy string array gives every id the width of the longest one. A single id of 10,000
    characters among 20,000 pairs would take 0.8 GB.
    """
    return np.array([*map(str, values.tolist()), None], dtype=object)[:-1]


def same_pairs(first: Outcomes, second: Outcomes) -> bool:
    """Whether both hold the same pairs of the same users, in any order."""
    in_one_order = all(
        np.array_equal(getattr(first, name), getattr(second, name))
        for name in ("pair_id", "user_id")
    )
    return in_one_order or _pair_keys(first) == _pair_keys(second)


def _pair_keys(outcomes: Outcomes) -> list[tuple[str, str]]:
    """Return the (pair id, user id) of every pair, sorted."""
    pairs, users = as_text(outcomes.pair_id), as_text(outcomes.user_id)
    return sorted(zip(pairs.tolist(), users.tolist(), strict=True))


def _sums_of_same_pairs(first: Outcomes, *others: Outcomes) -> list[UserSums]:
    """Return the sums over users of each model; raise unless all hold the same pairs."""
    for other in others:
        if len(first) == 0 or not same_pairs(first, other):
            shared = len(set(_pair_keys(first)) & set(_pair_keys(other)))
            raise bad_value(
                "pairs",
                f"{shared} shared of {len(first)} and {len(other)}",
                "two tables that hold the same pairs of the same users, at least one",
                "Evaluate both runs on the same data, splits and seed",
            )
    return [one.sums for one in (first, *others)]


def _joined(models: Sequence[UserSums]) -> tuple[list[UserSums], NDArray[np.int64] | None]:
    """Join users who have as many pairs, and in each model as many correct ones, if there are many users.

    Returns:
        The sums of one user of each group, for statistics of `OF_COUNTS` (nll and bin_gap are NaN), and
        how many users the group has; the sums as they are, and None, below `MANY_USERS` users, or if
        few are alike.
    """
    if models[0].n_users < MANY_USERS:
        return list(models), None
    counts = np.stack([models[0].count, *(one.correct for one in models)], axis=1)
    kinds, alike = np.unique(counts, axis=0, return_counts=True)
    if len(kinds) > models[0].n_users // 4:
        return list(models), None
    unknown = np.full(len(kinds), np.nan)
    return [
        UserSums(count=kinds[:, 0], correct=correct, nll=unknown, bin_gap=unknown[:, None])
        for correct in kinds.T[1:]
    ], alike


def _statistic_of(sums: UserSums, statistic: Callable[[UserSums, Array], Array]) -> Statistic:
    """Return the statistic of these sums as a function of the resampling weights alone."""
    return lambda weights: statistic(sums, weights)


def _difference_of(
    first: UserSums, second: UserSums, statistic: Callable[[UserSums, Array], Array]
) -> Statistic:
    """Return the first model's statistic minus the second's, as a function of the weights."""
    return lambda weights: statistic(first, weights) - statistic(second, weights)
