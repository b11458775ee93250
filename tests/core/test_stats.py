"""Statistics against hand-worked values, torchmetrics, a row-looping bootstrap, and simulation."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import scipy.stats
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from plrhf.core import bootstrap, stats
from plrhf.core.bootstrap import Estimate
from plrhf.core.stats import Outcomes, same_pairs, user_sums

# Users of 5, 2 and 7 pairs: accuracies 4/5, 1/2 (two ties) and 2/7.
USERS = np.array(["ann"] * 5 + ["bob"] * 2 + ["cid"] * 7)
MARGINS = np.array([1, 2, 3, 4, -1, 0, 0, 1, 2, -1, -2, -3, -1, -1], dtype=float)


def table(margins: np.ndarray = MARGINS, users: np.ndarray = USERS) -> Outcomes:
    pairs = np.array([f"pair-{number}" for number in range(len(users))])
    return Outcomes(pairs, users, margins, stats.correctness(margins))


def simulated(n_users: int, seed: int) -> Outcomes:
    """Beta-binomial users: own accuracy from Beta(6, 4), mean 0.6, and 5 to 59 pairs each."""
    generator = np.random.default_rng(seed)
    accuracy = generator.beta(6, 4, size=n_users)
    users = np.repeat(np.arange(n_users), generator.integers(5, 60, size=n_users))
    correct = generator.random(len(users)) < accuracy[users]
    return table(np.where(correct, 1.0, -1.0), users)


def test_hand_worked_values() -> None:
    cell = stats.summarise_outcomes(table(), n_resamples=50)
    assert cell["accuracy_micro"]["value"] == pytest.approx(7 / 14)
    assert cell["accuracy_macro"]["value"] == pytest.approx((4 / 5 + 1 / 2 + 2 / 7) / 3)
    assert cell["accuracy_worst10"]["value"] == pytest.approx(2 / 7)
    log_likelihood = sum(math.log(1 / (1 + math.exp(-margin))) for margin in MARGINS)
    assert cell["nll"]["value"] == pytest.approx(-log_likelihood / 14)
    assert (cell["n_pairs"], cell["n_users"]) == (14, 3)


def test_calibration_error_is_torchmetrics_one() -> None:
    generator = np.random.default_rng(5)
    margins = generator.normal(0.4, 2.0, size=613)
    outcomes = table(margins, generator.integers(13, size=613))
    logits = torch.stack([torch.tensor(margins), torch.zeros(613)], dim=1)
    labels = torch.zeros(613, dtype=torch.long)
    theirs = multiclass_calibration_error(logits.softmax(1), labels, num_classes=2, n_bins=15)
    ours = stats.summarise_outcomes(outcomes, names=("ece",))["ece"]["value"]
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_reliability_by_hand() -> None:
    # sigma(0) = .5 in bin 8, sigma(1) = .731 in bin 11, sigma(9) = .9999 in bin 15
    margins = np.array([0.0, 1, -1, 1, 9, 9])
    confident, accurate, count = stats.reliability(table(margins, USERS[:6]))
    assert confident == pytest.approx([0.5, 0.7310586, 0.9998766])
    assert accurate == pytest.approx([0.5, 2 / 3, 1])
    assert count.tolist() == [1, 3, 2]


def test_worst_tenth_of_23_users_is_the_worst_two() -> None:
    users = np.repeat(np.arange(23), 4)
    margins = np.ones(92)
    margins[:4] = -1  # user 0: 0 of 4
    margins[9 * 4 : 9 * 4 + 3] = -1  # user 9: 1 of 4
    cell = stats.summarise_outcomes(table(margins, users), n_resamples=20)
    assert cell["accuracy_worst10"]["value"] == pytest.approx((0 + 1 / 4) / 2)


@pytest.mark.parametrize("seed", range(9))
def test_weighted_statistics_equal_rows_written_out(seed: int) -> None:
    """A resample by weights gives what writing the drawn users' rows out again gives."""
    generator = np.random.default_rng(seed)
    users = np.repeat(np.arange(31), generator.integers(1, 9, size=31))
    outcomes = table(generator.normal(0.3, 1.0, size=len(users)), users)
    drawn = generator.integers(31, size=31)
    rows = np.concatenate([np.flatnonzero(users == user) for user in drawn])
    copies = np.concatenate(
        [np.full((users == user).sum(), copy) for copy, user in enumerate(drawn)]
    )
    written_out = stats.summarise_outcomes(table(outcomes.margin[rows], copies), n_resamples=1)
    weights = np.bincount(drawn, minlength=31)[None].astype(float)
    # user_sums sorts names as text; put the weights in that order
    weights = weights[:, np.argsort(np.arange(31).astype(str))]
    for name, statistic in stats.STATISTICS.items():
        value = statistic(stats.user_sums(outcomes), weights)[0]
        assert value == pytest.approx(written_out[name]["value"]), name


def test_interval_is_that_of_a_loop_over_resamples() -> None:
    outcomes = simulated(17, seed=1)
    means = [outcomes.correct[outcomes.user_id == user].mean() for user in range(17)]
    generator = np.random.default_rng(7)
    macros = [generator.choice(means, size=17).mean() for _ in range(4000)]
    cell = stats.summarise_outcomes(outcomes, n_resamples=4000, seed=2)
    tail = bootstrap.tail_share(17)
    expected = np.quantile(macros, (tail, 1 - tail))
    assert cell["accuracy_macro"]["ci95"] == pytest.approx(expected, abs=0.006)


@pytest.mark.slow
def test_figures_are_those_of_users_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawn users' pairs put together, resample by resample, with the same draws."""
    monkeypatch.setattr(bootstrap, "_BLOCK", 100)  # several blocks, the last of them smaller
    first, second = simulated(17, seed=3), simulated(17, seed=3)
    second = table(np.roll(second.margin, 5), second.user_id)
    names = np.sort(np.unique(first.user_id).astype(str))
    generator, samples = np.random.default_rng(4), []
    for _ in range(211):
        drawn = names[generator.integers(17, size=17)]
        rows = np.concatenate([np.flatnonzero(first.user_id.astype(str) == one) for one in drawn])
        samples.append(first.correct[rows].mean() - second.correct[rows].mean())
    tail = bootstrap.tail_share(17)
    found = stats.paired_test(first, second, n_resamples=211, seed=4)
    assert found["accuracy_micro"]["ci95"] == pytest.approx(np.quantile(samples, (tail, 1 - tail)))
    beyond = 1 + min(sum(one <= 0 for one in samples), sum(one >= 0 for one in samples))
    assert found["p_value"] == pytest.approx(bootstrap.p_value_of(min(0.5, beyond / 212), 17))


def test_users_who_are_alike_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are those of users drawn one by one, intervals but for chance (other random numbers)."""
    first = table(
        users=np.repeat(np.arange(400), 5), margins=np.tile([1.0, 2.0, 1.0, 3.0, -1.0], 400)
    )
    rng = np.random.default_rng(0)
    second, oracle = (table(rng.normal(mean, 1, 2_000), first.user_id) for mean in (0.3, 1.5))

    def found() -> list[Estimate]:
        tested = stats.paired_test(first, second)
        differences = stats.paired_difference(
            first, second, names=["accuracy_macro", "accuracy_micro"]
        )
        gain = stats.gain_recovered(first, second, oracle, n_resamples=10_000)
        return [
            *(tested[name] for name in (*differences, "effect_size")),
            *differences.values(),
            gain,
        ]

    by_one, likelihood = found(), stats.paired_difference(first, second, names=["nll"])
    monkeypatch.setattr(stats, "MANY_USERS", 400)
    (joined, *_), alike = stats._joined([first.sums, second.sums])
    assert alike is not None and alike.sum() == 400 and len(alike) == len(joined.count) < 7
    for one, other in zip(found(), by_one, strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-12)
        width = other["ci95"][1] - other["ci95"][0]
        assert one["ci95"] == pytest.approx(other["ci95"], abs=0.06 * width)
    assert stats.paired_difference(first, second, names=["nll"]) == likelihood  # of margins


def test_tail_share_by_tables() -> None:
    # t of 0.025 is 2.0930 for 19 degrees of freedom; 1.02598 times that is 2.1474, and Phi of it
    # 0.98412. Of thousands of users nothing is left to make up for.
    assert bootstrap.tail_share(20) == pytest.approx(1 - 0.98412, abs=2e-5)
    assert bootstrap.tail_share(100_000) == pytest.approx(0.025, abs=1e-5)


def test_interval_of_a_mean_is_student_s() -> None:
    """Where means of users are normal, the interval is the one of a textbook."""
    users = np.repeat(np.arange(12), 400)
    accuracy = scipy.stats.norm(0.6, 0.05).ppf((np.arange(12) + 0.5) / 12)
    correct = np.arange(400)[None] < np.round(400 * accuracy)[:, None]
    cell = stats.summarise_outcomes(
        table(np.where(correct.ravel(), 1.0, -1.0), users), n_resamples=40_000
    )
    means = correct.mean(axis=1)
    expected = scipy.stats.t.interval(0.95, 11, means.mean(), scipy.stats.sem(means))
    assert cell["accuracy_macro"]["ci95"] == pytest.approx(expected, abs=0.002)


def test_seed_decides_the_interval_alone() -> None:
    first, again, other = (stats.summarise_outcomes(simulated(17, 0), seed=s) for s in (4, 4, 5))
    assert first == again
    assert first["nll"]["value"] == other["nll"]["value"]
    assert first["nll"]["ci95"] != other["nll"]["ci95"]


def test_blocks_draw_all_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_BLOCK", 100)
    blocks = list(bootstrap._resample_weights(13, 60, seed=0))
    assert [len(block) for block in blocks] == [7] * 8 + [4]
    assert all((block.sum(axis=1) == 13).all() for block in blocks)


def test_empty_table_gives_none_and_one_user_no_interval() -> None:
    nobody = stats.summarise_outcomes(table(np.array([]), np.array([], dtype=str)))
    assert nobody["nll"] == {"value": None, "ci95": None}
    assert (nobody["n_pairs"], nobody["n_users"]) == (0, 0)
    alone = stats.summarise_outcomes(table(MARGINS[:5], USERS[:5]))
    assert alone["accuracy_micro"] == {"value": 0.8, "ci95": None}


def test_diverged_margins_are_refused() -> None:
    margins = MARGINS.copy()
    margins[3] = np.nan
    for read in (stats.summarise_outcomes, stats.reliability):
        with pytest.raises(ValueError, match=r"margin=nan is not allowed: expected finite numbers"):
            read(table(margins))


def test_paired_difference_by_hand_in_any_row_order() -> None:
    better = MARGINS.copy()
    better[-4:] = 5  # cid: 2/7 -> 6/7
    order = np.random.default_rng(0).permutation(14)
    first = table(better)
    first = Outcomes(*(getattr(first, name)[order] for name in first.__dataclass_fields__))
    difference = stats.paired_difference(first, table())
    assert difference["accuracy_micro"]["value"] == pytest.approx(4 / 14)
    assert difference["accuracy_macro"]["value"] == pytest.approx(4 / 7 / 3)
    # a resample without cid shows no difference; one of cid alone shows 4/7
    assert difference["accuracy_macro"]["ci95"] == pytest.approx([0, 4 / 7])


def test_paired_test_by_hand() -> None:
    better = MARGINS.copy()
    better[[4, -1, -2, -3, -4]] = 5  # ann: 4/5 -> 1, cid: 2/7 -> 6/7
    test = stats.paired_test(table(better), table(), n_resamples=999)
    assert test["accuracy_micro"]["value"] == pytest.approx(5 / 14)
    gaps = [1 / 5, 0, 4 / 7]
    assert test["accuracy_macro"]["value"] == pytest.approx(np.mean(gaps))
    expected = np.mean(gaps) / np.std(gaps, ddof=1)
    assert test["effect_size"]["value"] == pytest.approx(expected)
    assert test["effect_size"]["ci95"] is None  # some resamples hold one user thrice
    # No difference where only bob is drawn, 1 resample in 27, none below 0: z = -1.786, and t of 2
    # degrees of freedom is that over sqrt(3 / 2), -1.458, beyond which lies 0.141 on each side.
    assert test["p_value"] == pytest.approx(0.282, abs=0.05)
    reverse = stats.paired_test(table(), table(better), n_resamples=999)
    assert reverse["p_value"] == test["p_value"]
    assert reverse["effect_size"]["value"] == pytest.approx(-expected)


def test_paired_test_of_one_model_with_itself() -> None:
    test = stats.paired_test(table(), table(), n_resamples=99)
    assert test["accuracy_micro"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    assert test["effect_size"] == {"value": None, "ci95": None}
    assert test["p_value"] == 1.0
    alone = table(MARGINS[:5], USERS[:5])
    assert stats.paired_test(alone, alone, n_resamples=99)["p_value"] is None


def test_p_is_small_where_the_interval_excludes_0() -> None:
    for seed in range(12):
        weak = simulated(23, seed)
        margins = weak.margin.copy()
        margins[seed :: 11 + 9 * seed] *= -1
        strong = table(margins, weak.user_id)
        test = stats.paired_test(strong, weak, n_resamples=1999, seed=seed)
        low, high = test["accuracy_micro"]["ci95"] or (0, 0)
        assert test["p_value"] is not None
        if not 0.04 < test["p_value"] < 0.06:
            assert (test["p_value"] < 0.05) == (low > 0 or high < 0)


def test_price_is_a_paired_difference_of_nll() -> None:
    price = stats.paired_difference(table(MARGINS / 2), table(), names=("nll",))
    losses = [sum(math.log1p(math.exp(-m / k)) for m in MARGINS) / 14 for k in (2, 1)]
    assert price.keys() == {"nll"}
    assert price["nll"]["value"] == pytest.approx(losses[0] - losses[1])


def test_holm_by_hand() -> None:
    # Sorted: .01 x 4 = .04, .02 x 3 = .06, .03 x 2 = .06, .6 x 1; the order is the callers'.
    adjusted = bootstrap.holm([0.03, None, 0.01, 0.6, 0.02])
    assert adjusted == pytest.approx([0.06, None, 0.04, 0.6, 0.06])
    # The second is raised to the first; nothing passes 1.
    assert bootstrap.holm([0.5, 0.4]) == [0.8, 0.8]
    assert bootstrap.holm([0.9, 0.7, 0.8]) == [1.0, 1.0, 1.0]
    assert bootstrap.holm([None]) == [None] and bootstrap.holm([]) == []


def test_pairing_narrows_the_interval() -> None:
    weak = simulated(41, seed=2)
    margins = weak.margin.copy()
    margins[::9] = 1.0
    strong = table(margins, weak.user_id)
    low, high = stats.paired_difference(strong, weak)["accuracy_micro"]["ci95"] or (0, 0)
    alone = stats.summarise_outcomes(weak)["accuracy_micro"]["ci95"]
    assert 0 < low < high
    assert high - low < 0.5 * (alone[1] - alone[0])


@pytest.mark.parametrize("change", ["fewer", "other pair", "other user"])
def test_other_pairs_are_refused(change: str) -> None:
    pairs, users, margins = (field.copy() for field in (table().pair_id, USERS, MARGINS))
    if change == "fewer":
        pairs, users, margins = pairs[:-1], users[:-1], margins[:-1]
    elif change == "other pair":
        pairs[0] = "pair-x"
    else:
        users[0] = "bob"
    other = Outcomes(pairs, users, margins, stats.correctness(margins))
    count = len(pairs)
    with pytest.raises(ValueError, match=f"pairs='13 shared of 14 and {count}' is not allowed"):
        stats.paired_difference(table(), other)


def test_gain_recovered_by_hand() -> None:
    vanilla = table(np.where(np.arange(14) % 7 == 0, 1.0, -1.0))  # 2 of 14
    personal = table(np.where(np.arange(14) % 7 < 4, 1.0, -1.0))  # 8 of 14
    oracle = table(np.where(np.arange(14) % 7 < 6, 1.0, -1.0))  # 12 of 14
    recovered = stats.gain_recovered(personal, vanilla, oracle)
    assert recovered["value"] == pytest.approx(0.6)
    low, high = recovered["ci95"] or (0, 0)
    assert low <= 0.6 <= high
    assert stats.gain_recovered(oracle, vanilla, oracle) == {"value": 1.0, "ci95": [1.0, 1.0]}


def test_no_gain_to_recover_has_no_ratio() -> None:
    assert stats.gain_recovered(table(), table(), table()) == {"value": None, "ci95": None}


def coverage(n_simulations: int, n_users: int) -> float:
    """Share of simulations whose interval of the macro accuracy holds the true mean, 0.6."""
    hits = 0
    for seed in range(n_simulations):
        cell = stats.summarise_outcomes(simulated(n_users, seed), n_resamples=1000, seed=seed)
        low, high = cell["accuracy_macro"]["ci95"]
        hits += low <= 0.6 <= high
    return hits / n_simulations


@pytest.mark.slow
def test_interval_covers_the_truth_roughly() -> None:
    assert 0.88 <= coverage(150, n_users=40) <= 0.995


def test_one_long_id_does_not_widen_all_others() -> None:
    n_pairs, long = 20_000, "x" * 10_000
    users = np.array([*(f"u{place % 7}" for place in range(n_pairs - 1)), long], dtype=object)
    pairs = np.array([f"p{place}" for place in range(n_pairs)], dtype=object)
    outcomes = Outcomes(pairs, users, np.ones(n_pairs), np.ones(n_pairs))
    tracemalloc.start()
    sums = user_sums(outcomes)
    assert same_pairs(outcomes, outcomes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sums.n_users == 8 and sums.count.tolist()[-1] == 1
    assert peak < 60e6  # as text of fixed width the users alone take 800 MB
