"""How well anybody could know a person of the embedded world from a few of their pairs.

The ideal observer knows the style of each text and how preferences are distributed, and predicts by Bayes'
rule: no method does better on average. What it leaves of the oracle's gain is noise in the choices.

    python benchmarks/ideal_observer.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse

import numpy as np

from plrhf.data.sources.persona_texts import measure
from plrhf.data.sources.personas import POPULATION_MEAN, PersonasSource

SHOTS = (0, 1, 2, 4, 8, 16, 32)
Pairs = tuple[np.ndarray, np.ndarray]  # style differences [N, A], true margins [N]


def pairs_by_user(source: PersonasSource) -> list[Pairs]:
    """Return what unseen users have chosen: chosen less rejected style, and their true margins."""
    margins = source.oracle_margins()
    seen = set(source.user_ids[: source.n_users])
    found: dict[str, list[tuple[np.ndarray, float]]] = {}
    for _, row in source.records():
        if row["user_id"] not in seen:
            styles = [np.array(measure(str(row[name]))) for name in ("chosen", "rejected")]
            of_user = found.setdefault(str(row["user_id"]), [])
            of_user.append((styles[0] - styles[1], margins[str(row["pair_id"])]))
    return [tuple(map(np.array, zip(*pairs, strict=True))) for pairs in found.values()]  # type: ignore[misc]


def draw_people(scale: float, n: int, generator: np.random.Generator) -> np.ndarray:
    """Draw preference vectors [n, A] as the world of individuals does."""
    away = generator.standard_normal((n, len(POPULATION_MEAN)))
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    return np.asarray(scale * (np.array(POPULATION_MEAN) + away))


def predicted(given: np.ndarray, asked: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Return the probability of each choice asked, after the choices given, [N].

    Args:
        given, asked: style differences [k, A] and [N, A]. people: draws from the population, [P, A].
    """
    fit = -np.logaddexp(0, -(people @ given.T)).sum(axis=1)
    weight = np.exp(fit - fit.max())
    return np.asarray((weight / weight.sum()) @ (1 / (1 + np.exp(-people @ asked.T))))


def main() -> None:
    """Print a line for each seed and number of pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shots", type=int, nargs="+", default=SHOTS)
    parser.add_argument("--users", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--people", type=int, default=20_000)
    options = parser.parse_args()
    print("seed pairs generic observer oracle share")
    for seed in options.seeds:
        source = PersonasSource(
            kind="individual",
            n_unseen_users=options.users,
            test_pairs_per_user=options.pairs,
            pairs_per_user=1,
            val_pairs_per_user=0,
            seed=seed,
        )
        everybody = pairs_by_user(source)
        generator = np.random.default_rng(seed)
        people = draw_people(source.scale, options.people, generator)
        orders = [generator.permutation(options.pairs) for _ in range(options.draws)]
        for k in options.shots:
            right: list[np.ndarray] = []
            for styles, true in everybody:
                for order in orders:
                    given, asked = styles[order[:k]], styles[order[max(options.shots) :]]
                    knows = predicted(given, asked, people) > 0.5
                    nobody = predicted(given[:0], asked, people) > 0.5
                    best = true[order[max(options.shots) :]] > 0
                    right.append(np.stack([nobody, knows, best], axis=1))
            generic, observer, oracle = np.concatenate(right).mean(axis=0)
            share = (observer - generic) / (oracle - generic)
            print(f"{seed} {k} {generic:.3f} {observer:.3f} {oracle:.3f} {share:.3f}")


if __name__ == "__main__":
    main()
