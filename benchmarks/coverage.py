"""How often the 95% intervals hold the truth, on simulated users whose accuracies are known.

    python benchmarks/coverage.py                  # 1,000 evaluations of 100 users, about a minute
    python benchmarks/coverage.py --users 20 --out coverage.json

A user's accuracy is drawn from Beta(6, 4); two models are evaluated on the same users and pairs, as
good as one another on average, so that their true difference is 0. In the world "even" how many
pairs a user has (5 to 200) says nothing of the user; in "tilted" users with more pairs are easier.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from plrhf.core.stats import Outcomes, correctness, paired_test, summarise_outcomes

WORLDS = ("even", "tilted")
ALPHA, BETA = 6.0, 4.0
FEWEST, MORE = 5, 195  # pairs a user
RESAMPLES = 2000


def truths(world: str) -> dict[str, float]:
    """Expected accuracies over users and over pairs: E[a] and E[n a] / E[n], n pairs, a ~ Beta."""
    mean, square, cube = (
        np.prod([(ALPHA + i) / (ALPHA + BETA + i) for i in range(power)]) for power in (1, 2, 3)
    )
    if world == "even":
        return {"accuracy_micro": float(mean), "accuracy_macro": float(mean)}
    micro = (FEWEST * mean + MORE * cube) / (FEWEST + MORE * square)  # E[n | a] = 5 + 195 a^2
    return {"accuracy_micro": float(micro), "accuracy_macro": float(mean)}


def evaluation(world: str, n_users: int, seed: int) -> Iterator[Outcomes]:
    """What two models, equally good on average, say of the same pairs of `n_users` users."""
    generator = np.random.default_rng([WORLDS.index(world), seed])
    easy = generator.beta(ALPHA, BETA, size=n_users)
    if world == "even":
        counts = np.exp(generator.uniform(np.log(FEWEST), np.log(FEWEST + MORE), n_users))
        counts = counts.astype(int)
    else:
        counts = FEWEST + generator.binomial(MORE, easy**2)
    users = np.repeat(np.arange(n_users), counts)
    pairs = np.arange(len(users))
    other = easy + 0.3 * np.minimum(easy, 1 - easy) * generator.uniform(-1, 1, n_users)
    for accuracy in (easy, other):
        margin = np.where(generator.random(len(users)) < accuracy[users], 1.0, -1.0)
        yield Outcomes(pairs, users, margin, correctness(margin))


def coverage(world: str, *, n_simulations: int, n_users: int) -> dict[str, float]:
    """Share of evaluations whose interval holds the truth, and whose p of no difference is < .05."""
    true = truths(world)
    hits = dict.fromkeys([*true, "difference_micro", "difference_macro", "p_below_0.05"], 0)
    for seed in range(n_simulations):
        first, second = evaluation(world, n_users, seed)
        found = summarise_outcomes(first, names=tuple(true), n_resamples=RESAMPLES, seed=seed)
        for name, value in true.items():
            low, high = found[name]["ci95"]
            hits[name] += low <= value <= high
        test = paired_test(second, first, n_resamples=RESAMPLES, seed=seed)
        for name, estimate in (
            ("difference_micro", test["accuracy_micro"]),
            ("difference_macro", test["accuracy_macro"]),
        ):
            assert estimate["ci95"] is not None
            hits[name] += estimate["ci95"][0] <= 0 <= estimate["ci95"][1]
        assert test["p_value"] is not None
        hits["p_below_0.05"] += test["p_value"] < 0.05
    return {name: count / n_simulations for name, count in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    given = parser.parse_args()
    how = {"n_simulations": given.simulations, "n_users": given.users}
    text = json.dumps({**how, **{world: coverage(world, **how) for world in WORLDS}}, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
