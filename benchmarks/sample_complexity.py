"""How many pairs a user and how many users each kind of user model takes, on simulated people.

    python benchmarks/sample_complexity.py
    python benchmarks/sample_complexity.py --users 25 50 100 200 400 --pairs 20 --features 16 --worlds 10

People choose between responses with random features by a linear reward of their own. All kinds of model
are fitted to the same choices by penalised maximum likelihood, each with the spread of its parameters that
the world has; factors of people are integrated out by Laplace's approximation, as those of clusters are
exactly. They are judged by the share of new choices that they predict. The figures of
docs/sample_complexity.md are of these commands.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from plrhf.core.bootstrap import Estimate

KINDS = ("low_rank", "clusters")
LEVELS = (0.5, 0.9)
"""Worlds, and the shares of the gain whose sizes are looked for."""

N_STARTS, FIRST_PAIRS = 4, 10
"""Starts of the fit of clusters, which has several minima, and pairs a person that they are fitted to."""

SCALE = 2.0  # standard deviation of a margin in log odds, shared and personal part alike


class World(NamedTuple):
    """People's weights, [U, d], what they are made of, and their choices.

    Attributes:
        known: what is known of each person, [U, k]: the factors of the low-rank world, else the cluster.
        differences: features of the chosen response less those of the rejected one, [U, T, d].
    """

    weights: Tensor
    known: Tensor
    differences: Tensor


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw standard normal numbers, float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_world(
    kind: str, n_users: int, n_pairs: int, *, d: int, k: int, generator: torch.Generator
) -> World:
    """Draw people with k factors of their own beside shared weights, or of k clusters; they choose."""

    size = SCALE / math.sqrt(2 * d)
    shared, basis = (
        size * drawn(generator, d),
        torch.linalg.qr(drawn(generator, d, k))[0].T * math.sqrt(d / k),
    )
    if kind == "low_rank":
        known = drawn(generator, n_users, k)
        weights = shared + size * known @ basis
    else:
        number = torch.randint(k, (n_users,), generator=generator)
        known = torch.nn.functional.one_hot(number, k).double()
        weights = shared + (size * drawn(generator, k, d))[number]
    features = drawn(generator, n_users, n_pairs, d)
    margins = (features * weights[:, None]).sum(dim=-1)
    chosen = torch.rand(n_users, n_pairs, generator=generator) < torch.sigmoid(margins)
    return World(weights, known, torch.where(chosen[..., None], features, -features))


def fitted(
    start: Sequence[Tensor], loss: Callable[..., Tensor], weights: Callable[..., Tensor]
) -> tuple[float, Tensor]:
    """Minimise a loss of parameters; return the loss and each person's weights, [U, d]."""
    parameters = [one.clone().requires_grad_() for one in start]
    optimiser = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = loss(*parameters)
        found.backward()
        return found

    optimiser.step(closure)
    with torch.no_grad():
        return loss(*parameters).item(), weights(*parameters).detach()


def nll(weights: Tensor, differences: Tensor) -> Tensor:
    """Return the negative log-likelihood of each person's choices, [..., U], of weights [..., U, d]."""
    return -logsigmoid((differences * weights[..., None, :]).sum(dim=-1)).sum(dim=-1)


def estimates(
    world: World, kinds: Sequence[str], *, k: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return each person's weights as estimated by each kind of model, [U, d]."""
    n_users, _, d = world.differences.shape
    x, variance = world.differences, SCALE**2 / (2 * d)
    shared = x.new_zeros(d)

    def penalty(values: Tensor, spread: float) -> Tensor:
        return values.square().sum() / (2 * spread)

    def of_rank(rank: int) -> tuple[float, Tensor]:
        start = [shared, 0.1 * drawn(generator, n_users, rank)]
        start.append(drawn(generator, rank, d))
        size = math.sqrt(variance)

        def weights(w: Tensor, z: Tensor, basis: Tensor) -> Tensor:
            return w + size * z @ basis

        def loss(w: Tensor, z: Tensor, basis: Tensor) -> Tensor:
            found = weights(w, z, basis)
            chance = torch.sigmoid((x * found[:, None]).sum(dim=-1))
            along = size * x @ basis.T * (chance * (1 - chance)).sqrt()[..., None]  # [U, T, rank]
            spread = (
                torch.eye(rank, dtype=x.dtype) + along.mT @ along
            )  # inverse of the factors' posterior variance
            priors = penalty(w, variance) + penalty(z, 1.0) + penalty(basis, 1.0)
            return nll(found, x).sum() + priors + 0.5 * torch.logdet(spread).sum()

        return fitted(start, loss, weights)

    def of_clusters() -> tuple[float, Tensor]:
        near = 0.1 * math.sqrt(2 * variance)

        def log_shares(centres: Tensor, pairs: Tensor) -> Tensor:
            return -nll(centres[:, None], pairs)  # [k, U]

        def fit(start: Tensor, pairs: Tensor) -> tuple[float, Tensor]:
            def loss(centres: Tensor) -> Tensor:
                shares = log_shares(centres, pairs)
                return -shares.logsumexp(dim=0).sum() + penalty(centres, 2 * variance)

            return fitted([start], loss, lambda centres: centres)

        few = x[:, :FIRST_PAIRS]  # of many pairs one centre would take all people at once
        starts = [near * drawn(generator, k, d) for _ in range(N_STARTS)]
        _, first = min((fit(start, few) for start in starts), key=lambda one: one[0])
        loss, centres = fit(first, x)
        return loss, log_shares(centres, x).softmax(dim=0).T @ centres

    def of_own() -> tuple[float, Tensor]:
        start = [shared, x.new_zeros(n_users, d)]
        return fitted(
            start,
            lambda w, own: nll(w + own, x).sum() + penalty(w, variance) + penalty(own, variance),
            lambda w, own: w + own,
        )

    def of_known() -> tuple[float, Tensor]:
        start = [shared, x.new_zeros(world.known.shape[1], d)]
        return fitted(
            start,
            lambda w, a: (
                nll(w + world.known @ a, x).sum() + penalty(w, variance) + penalty(a, variance)
            ),
            lambda w, a: w + world.known @ a,
        )

    def of_nobody() -> tuple[float, Tensor]:
        return fitted(
            [shared],
            lambda w: nll(w.expand(n_users, d), x).sum() + penalty(w, variance),
            lambda w: w.expand(n_users, d),
        )

    ways: dict[str, Callable[[], tuple[float, Tensor]]] = {
        "vanilla": of_nobody,
        "own weights": of_own,
        "clusters": of_clusters,
        "features": of_known,
        f"rank {k}": lambda: of_rank(k),
    }
    return {kind: ways[kind]()[1] for kind in kinds}


def expected_accuracy(found: Tensor, truth: Tensor, differences: Tensor) -> Tensor:
    """Return how often the choices of people with weights [U, d] are predicted by others, [U].

    Args:
        differences: of features, of the new pairs that are asked, [n, d].
    """
    margins, predicted = truth @ differences.T, found @ differences.T
    return torch.sigmoid(margins * predicted.sign()).mean(dim=1)


def shares_of_gain(
    kind: str, sizes: Sequence[tuple[int, int]], *, d: int, k: int, n_worlds: int
) -> dict[str, Tensor]:
    """Return the share of the oracle's gain over vanilla of each kind of model, [sizes, worlds]."""
    kinds = ["vanilla", "own weights", f"rank {k}", "clusters", "features"]
    found = {name: torch.zeros(len(sizes), n_worlds) for name in kinds[1:]}
    for place, (n_users, n_pairs) in enumerate(sizes):
        for seed in range(n_worlds):
            generator = torch.Generator().manual_seed(seed)
            world = make_world(kind, n_users, n_pairs, d=d, k=k, generator=generator)
            weights = estimates(world, kinds, k=k, generator=generator)
            asked = drawn(generator, 500, d)
            right = {
                name: expected_accuracy(one, world.weights, asked).mean().item()
                for name, one in {**weights, "oracle": world.weights}.items()
            }
            possible = right["oracle"] - right["vanilla"]
            for name, shares in found.items():
                shares[place, seed] = (right[name] - right["vanilla"]) / possible
    return found


def size_at(sizes: Sequence[float], shares: Tensor, level: float) -> float:
    """Return the size at which the mean share over worlds reaches a level and stays there.

    Between two sizes it is interpolated in the logarithm of the size. It is the smallest size if that is
    enough, and infinity if the largest is not.

    Args:
        sizes: in increasing order. shares: [sizes, worlds].
    """
    mean = shares.mean(dim=1).tolist()
    last = max((place for place, one in enumerate(mean) if one < level), default=-1)
    if last == len(mean) - 1 or last == -1:
        return math.inf if last >= 0 else sizes[0]
    part = (level - mean[last]) / (mean[last + 1] - mean[last])
    return sizes[last] * (sizes[last + 1] / sizes[last]) ** part


def with_interval(sizes: Sequence[float], shares: Tensor, level: float) -> Estimate:
    """Return `size_at` and the interval that holds 95% of it over worlds drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    n_worlds = shares.shape[1]
    chosen = torch.randint(n_worlds, (1000, n_worlds), generator=generator)
    found = sorted(size_at(sizes, shares[:, worlds], level) for worlds in chosen)
    return {"value": size_at(sizes, shares, level), "ci95": [found[24], found[-25]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, nargs="+", default=[200])
    parser.add_argument("--pairs", type=int, nargs="+", default=[5, 10, 20, 40, 80, 160])
    parser.add_argument("--features", type=int, nargs="+", default=[8, 16], metavar="D")
    parser.add_argument("--rank", type=int, default=2, help="true rank, and number of clusters")
    parser.add_argument("--worlds", type=int, default=6)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sizes = [(users, pairs) for users in given.users for pairs in given.pairs]
    by_users = len(given.users) > len(given.pairs)
    axis = [float(users if by_users else pairs) for users, pairs in sizes]
    torch.set_num_threads(1)
    results = []
    for kind in given.kinds:
        for d in given.features:
            print(f"\n{kind}, d = {d}, {'users' if by_users else 'pairs a user'}: {axis}")
            found = shares_of_gain(kind, sizes, d=d, k=given.rank, n_worlds=given.worlds)
            for name, shares in found.items():
                needed = {level: with_interval(axis, shares, level) for level in LEVELS}
                line = f"{name:12} " + " ".join(f"{one:5.2f}" for one in shares.mean(dim=1))
                for level, one in needed.items():
                    low, high = one["ci95"] or (math.nan, math.nan)
                    line += f"   {level:.0%} at {one['value']:.3g} [{low:.3g}, {high:.3g}]"
                print(line, flush=True)
                row = {"world": kind, "d": d, "model": name, "sizes": axis, "needed": needed}
                results.append({**row, "shares": shares.mean(dim=1).tolist()})
    if given.out is not None:
        given.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
