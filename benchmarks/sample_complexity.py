"""How many pairs a user and how many users each kind of user model takes, on simulated people.

    python benchmarks/sample_complexity.py
    python benchmarks/sample_complexity.py --users 20 40 80 160 320 --pairs 8

People choose between responses with random features by a linear reward of their own. All kinds of model
are fitted to the same choices by penalised maximum likelihood, each with the spread of its parameters that
the world has, and judged by the share of new choices that they predict. The
figures of docs/sample_complexity.md are of these commands.
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
from plrhf.reporting.learning_curves import LEVEL, learning_curve

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


def make_world(
    kind: str, n_users: int, n_pairs: int, *, d: int, k: int, generator: torch.Generator
) -> World:
    """Draw people with k factors of their own beside shared weights, or of k clusters; they choose."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size = SCALE / math.sqrt(2 * d)
    shared, basis = size * normal(d), torch.linalg.qr(normal(d, k))[0].T * math.sqrt(d / k)
    if kind == "low_rank":
        known = normal(n_users, k)
        weights = shared + size * known @ basis
    else:
        number = torch.randint(k, (n_users,), generator=generator)
        known = torch.nn.functional.one_hot(number, k).float()
        weights = shared + (size * normal(k, d))[number]
    features = normal(n_users, n_pairs, d)
    margins = (features * weights[:, None]).sum(dim=-1)
    chosen = torch.rand(n_users, n_pairs, generator=generator) < torch.sigmoid(margins)
    return World(weights, known, torch.where(chosen[..., None], features, -features))


def fitted(
    start: Sequence[Tensor], loss: Callable[..., Tensor], weights: Callable[..., Tensor]
) -> Tensor:
    """Minimise a loss of parameters, and return each person's weights, [U, d]."""
    parameters = [one.clone().requires_grad_() for one in start]
    optimiser = torch.optim.LBFGS(parameters, max_iter=80, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = loss(*parameters)
        found.backward()
        return found

    optimiser.step(closure)
    with torch.no_grad():
        return weights(*parameters).detach()


def nll(weights: Tensor, differences: Tensor) -> Tensor:
    """Return the negative log-likelihood of each person's choices, [..., U], of weights [..., U, d]."""
    return -logsigmoid((differences * weights[..., None, :]).sum(dim=-1)).sum(dim=-1)


def estimates(
    world: World, kinds: Sequence[str], *, k: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return each person's weights as estimated by each kind of model, [U, d]."""
    n_users, _, d = world.differences.shape
    x, variance = world.differences, SCALE**2 / (2 * d)
    shared = torch.zeros(d)

    def penalty(values: Tensor, spread: float) -> Tensor:
        return values.square().sum() / (2 * spread)

    def of_rank(rank: int) -> Tensor:
        start = [shared, torch.zeros(n_users, rank), torch.randn(rank, d, generator=generator)]
        start[1] += 0.1 * torch.randn(n_users, rank, generator=generator)

        def weights(w: Tensor, z: Tensor, basis: Tensor) -> Tensor:
            return w + math.sqrt(variance) * z @ basis

        def loss(w: Tensor, z: Tensor, basis: Tensor) -> Tensor:
            priors = penalty(w, variance) + penalty(z, 1.0) + penalty(basis, 1.0)
            return nll(weights(w, z, basis), x).sum() + priors

        return fitted(start, loss, weights)

    def of_clusters() -> Tensor:
        start = [math.sqrt(2 * variance) * torch.randn(k, d, generator=generator)]

        def log_shares(centres: Tensor) -> Tensor:
            return -nll(centres[:, None], x)  # [k, U]

        def loss(centres: Tensor) -> Tensor:
            return -log_shares(centres).logsumexp(dim=0).sum() + penalty(centres, 2 * variance)

        return fitted(start, loss, lambda centres: log_shares(centres).softmax(dim=0).T @ centres)

    def of_own() -> Tensor:
        start = [shared, torch.zeros(n_users, d)]
        return fitted(
            start,
            lambda w, own: nll(w + own, x).sum() + penalty(w, variance) + penalty(own, variance),
            lambda w, own: w + own,
        )

    def of_known() -> Tensor:
        start = [shared, torch.zeros(world.known.shape[1], d)]
        return fitted(
            start,
            lambda w, a: (
                nll(w + world.known @ a, x).sum() + penalty(w, variance) + penalty(a, variance)
            ),
            lambda w, a: w + world.known @ a,
        )

    def of_nobody() -> Tensor:
        return fitted(
            [shared],
            lambda w: nll(w.expand(n_users, d), x).sum() + penalty(w, variance),
            lambda w: w.expand(n_users, d),
        )

    ways: dict[str, Callable[[], Tensor]] = {
        "vanilla": of_nobody,
        "own weights": of_own,
        "clusters": of_clusters,
        "features": of_known,
        f"rank {k}": lambda: of_rank(k),
    }
    return {kind: ways[kind]() for kind in kinds}


def expected_accuracy(found: Tensor, truth: Tensor, differences: Tensor) -> Tensor:
    """Return how often the choices of people with weights [U, d] are predicted by others, [U].

    Args:
        differences: of features, of the new pairs that are asked, [n, d].
    """
    margins, predicted = truth @ differences.T, found @ differences.T
    return torch.sigmoid(margins * predicted.sign()).mean(dim=1)


def run(
    kind: str, sizes: Sequence[tuple[int, int]], *, d: int, k: int, n_worlds: int
) -> dict[str, list[Estimate]]:
    """Return the share of the oracle's gain over vanilla of each kind of model, at each size.

    Intervals are 1.96 standard errors over worlds.
    """
    kinds = ["vanilla", "own weights", f"rank {k}", "clusters", "features"]
    found: dict[str, list[Estimate]] = {name: [] for name in kinds[1:]}
    for n_users, n_pairs in sizes:
        shares: dict[str, list[float]] = {name: [] for name in kinds[1:]}
        for seed in range(n_worlds):
            generator = torch.Generator().manual_seed(seed)
            world = make_world(kind, n_users, n_pairs, d=d, k=k, generator=generator)
            found_weights = estimates(world, kinds, k=k, generator=generator)
            asked = torch.randn(500, d, generator=generator)
            right = {
                name: float(expected_accuracy(one, world.weights, asked).mean())
                for name, one in {**found_weights, "oracle": world.weights}.items()
            }
            for name in shares:
                gain = (right[name] - right["vanilla"]) / (right["oracle"] - right["vanilla"])
                shares[name].append(gain)
        for name, values in shares.items():
            mean = torch.tensor(values).mean().item()
            half = 1.96 * torch.tensor(values).std().item() / math.sqrt(n_worlds)
            found[name].append({"value": mean, "ci95": [mean - half, mean + half]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, nargs="+", default=[60])
    parser.add_argument("--pairs", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--features", type=int, nargs="+", default=[8, 16], metavar="D")
    parser.add_argument("--rank", type=int, default=2, help="true rank, and number of clusters")
    parser.add_argument("--worlds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sizes = [(users, pairs) for users in given.users for pairs in given.pairs]
    by_users = len(given.users) > len(given.pairs)
    axis = [float(users if by_users else pairs) for users, pairs in sizes]
    torch.set_num_threads(1)
    results = {}
    for kind in ("low_rank", "clusters"):
        for d in given.features:
            print(f"\n{kind}, d = {d}, {'users' if by_users else 'pairs a user'}: {axis}")
            gains = run(kind, sizes, d=d, k=given.rank, n_worlds=given.worlds)
            for name, one in gains.items():
                shown = " ".join(f"{point['value']:5.2f}" for point in one)
                line, curve = f"{name:12} {shown}", learning_curve(axis, one)
                if curve is not None:
                    needed, (low, high) = curve.needed["value"], curve.needed["ci95"] or (0, 0)
                    line += f"   {LEVEL:.0%} at {needed:.3g} [{low:.3g}, {high:.3g}]"
                    line += f", limit {curve.limit['value']:.2f}, c {curve.fit.rate:.2f}"
                    results[f"{kind} {d} {name}"] = needed
                print(line, flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
