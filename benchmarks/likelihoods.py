"""How often the 95% intervals of each likelihood's parameters hold the truth, on simulated people.

    python benchmarks/likelihoods.py                     # 1,000 simulations of each
    python benchmarks/likelihoods.py --only ties --simulations 100 --out coverage.json

People answer by known parameters. Each simulation draws answers anew, fits the parameters by maximum
likelihood and asks whether the intervals of 1.96 standard errors, from the inverse Hessian, hold what the
answers were drawn from. Temperatures are each person's own and shrunk: their truths are drawn from their
prior, and the intervals are those of the posterior (Laplace).
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, hessian, vmap

from plrhf.core.choices import (
    cumulative_logit,
    davidson,
    margins_with_errors,
    plackett_luce,
)
from plrhf.core.losses import bradley_terry

WEIGHTS = torch.tensor([0.8, -1.2, 0.5], dtype=torch.float64)
"""What everybody likes: reward = w . x of a text with features x."""

N_PEOPLE, SPREAD = 30, 0.5
"""People with temperatures of their own, and the standard deviation of their logarithms."""

N_RANKED = 5
FIRST, SECOND = torch.triu_indices(N_RANKED, N_RANKED, 1)


SCALE = torch.tensor([-2.0, -0.5, 0.5, 1.5], dtype=torch.float64)
OTHER_SCALE = torch.tensor([-1.0, 0.0, 1.5, 3.5], dtype=torch.float64)
"""Thresholds between five ratings, of two people."""


class Answers(NamedTuple):
    """True parameters [S, P] of S simulations, weights of the reward first, and what was answered."""

    truth: Tensor
    data: tuple[Tensor, ...]  # [S, ...] each


class Study(NamedTuple):
    """Draws answers of S simulations, and the loss of one simulation's parameters [P]."""

    draw: Callable[[int, torch.Generator], Answers]
    loss: Callable[..., Tensor]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _chosen(x: Tensor, chance: Tensor, generator: torch.Generator) -> Tensor:
    """Return feature differences [S, N, 3], turned where the second response was chosen."""
    first = torch.rand(chance.shape, generator=generator, dtype=torch.float64) < chance
    return torch.where(first[..., None], x, -x)


def _truth(n: int, *others: float) -> Tensor:
    return torch.cat([WEIGHTS, torch.tensor(others, dtype=torch.float64)]).expand(n, -1)


def draw_ties(n: int, generator: torch.Generator) -> Answers:
    """Draw 400 answers, of which about a third are ties (Davidson's model)."""
    log_tie = 0.2
    x = _normal(generator, n, 400, 3)
    margins = x @ WEIGHTS
    scores = torch.stack([margins / 2, -margins / 2, torch.full_like(margins, log_tie)], dim=-1)
    answer = torch.multinomial(scores.softmax(-1).flatten(0, 1), 1, generator=generator)
    answer = answer.view_as(margins)
    x = torch.where((answer == 1)[..., None], -x, x)  # the second response was chosen
    return Answers(_truth(n, log_tie), (x, answer == 2))


def loss_of_ties(parameters: Tensor, x: Tensor, is_tie: Tensor) -> Tensor:
    return davidson(x @ parameters[:3], parameters[3], is_tie).sum()


def draw_errors(n: int, generator: torch.Generator) -> Answers:
    """Draw 2,000 choices by people who are sure, and who answer at random in one case of five."""
    error, sure = 0.2, 2 * WEIGHTS
    x = _normal(generator, n, 2000, 3)
    chance = (1 - error) * (x @ sure).sigmoid() + 0.5 * error
    truth = torch.cat([sure, torch.tensor([math.log(error / (1 - error))])]).expand(n, -1)
    return Answers(truth, (_chosen(x, chance, generator),))


def loss_of_errors(parameters: Tensor, x: Tensor) -> Tensor:
    return bradley_terry(margins_with_errors(x @ parameters[:3], parameters[3])).sum()


def draw_temperatures(n: int, generator: torch.Generator) -> Answers:
    """Draw 60 choices of each of 30 people, whose log-temperatures are from N(0, 0.5^2)."""
    log_temperature = SPREAD * _normal(generator, n, N_PEOPLE)
    x = _normal(generator, n, N_PEOPLE, 60, 3)
    chance = (x @ WEIGHTS / log_temperature.exp()[..., None]).sigmoid()
    return Answers(torch.cat([_truth(n), log_temperature], 1), (_chosen(x, chance, generator),))


def loss_of_temperatures(parameters: Tensor, x: Tensor) -> Tensor:
    log_temperature = parameters[3:]
    margins = x @ parameters[:3] / log_temperature.exp()[:, None]
    return bradley_terry(margins).sum() + 0.5 * (log_temperature / SPREAD).square().sum()


def draw_rankings(n: int, generator: torch.Generator) -> Answers:
    """Draw 100 rankings of five responses (Plackett and Luce's model)."""
    x = _normal(generator, n, 100, N_RANKED, 3)
    scores = (x @ WEIGHTS).exp().flatten(0, 1)
    order = torch.multinomial(scores, N_RANKED, generator=generator)  # in turn, without replacement
    ranked = x.gather(2, order.view(n, 100, N_RANKED, 1).expand_as(x))
    return Answers(_truth(n), (ranked[:, :, FIRST] - ranked[:, :, SECOND],))


def loss_of_rankings(parameters: Tensor, x: Tensor) -> Tensor:
    return plackett_luce(x @ parameters, FIRST).sum()  # of each ranking, [100, 10]


def draw_ratings(n: int, generator: torch.Generator) -> Answers:
    """Draw 200 ratings from 1 to 5 of each of two people, who use the scale in different ways."""
    thresholds = torch.stack([SCALE, OTHER_SCALE])
    x = _normal(generator, n, 2, 200, 3)
    noise = torch.rand(n, 2, 200, generator=generator, dtype=torch.float64).logit()
    latent = x @ WEIGHTS + noise
    level = (latent[..., None] > thresholds[:, None]).sum(-1)
    gaps = thresholds.diff(dim=1).log()
    own = torch.cat([thresholds[:, :1], gaps], dim=1).flatten()
    return Answers(torch.cat([WEIGHTS, own]).expand(n, -1), (x, level))


def loss_of_ratings(parameters: Tensor, x: Tensor, level: Tensor) -> Tensor:
    own = parameters[3:].view(2, -1)
    thresholds = torch.cat([own[:, :1], own[:, 1:].exp()], dim=1).cumsum(1)
    spread = thresholds[:, None].expand(-1, x.shape[1], -1)
    return cumulative_logit(x @ parameters[:3], level, spread).sum()


STUDIES = {
    "ties": Study(draw_ties, loss_of_ties),
    "errors": Study(draw_errors, loss_of_errors),
    "temperature": Study(draw_temperatures, loss_of_temperatures),
    "rankings": Study(draw_rankings, loss_of_rankings),
    "ratings": Study(draw_ratings, loss_of_ratings),
}


def fit(study: Study, answers: Answers, *, steps: int = 40) -> tuple[Tensor, Tensor]:
    """Minimise each simulation's loss by damped Newton steps; return parameters and standard errors."""
    warnings.filterwarnings("ignore", message="An output with one or more elements was resized")
    loss, data = vmap(study.loss), answers.data
    curvature = vmap(hessian(study.loss))
    at = torch.zeros_like(answers.truth)
    at[:, :3] = 0.1  # where all rewards are zero, nothing says how noisy choices are
    for _ in range(steps):
        gradient = vmap(grad(study.loss))(at, *data)
        values, basis = torch.linalg.eigh(curvature(at, *data))
        along = (basis.mT @ gradient[..., None]) / values.abs().clamp(min=1e-3)[..., None]
        step, before = (basis @ along)[..., 0], loss(at, *data)
        size = torch.ones(len(at), 1, dtype=at.dtype)
        for _ in range(20):
            worse = ~(loss(at - size * step, *data) <= before)
            size[worse] /= 2
        at = at - size * step
        if (size * step).abs().max() < 1e-7:
            break
    covariance = torch.linalg.inv(curvature(at, *data))
    return at, covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()


def coverage(name: str, *, n_simulations: int, at_once: int = 50) -> dict[str, float]:
    """Return the share of intervals that hold the truth: of all parameters, the weights, the others."""
    study, hits = STUDIES[name], []
    for seed in range(0, n_simulations, at_once):
        generator = torch.Generator().manual_seed(seed)
        answers = study.draw(min(at_once, n_simulations - seed), generator)
        found, error = fit(study, answers)
        hits.append((found - answers.truth).abs() <= 1.96 * error)
    each = torch.cat(hits).double().mean(0)
    parts = {"all": each, "weights": each[:3], "others": each[3:]}
    return {kind: round(float(one.mean()), 4) for kind, one in parts.items() if len(one) > 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--only", choices=sorted(STUDIES), nargs="*", default=list(STUDIES))
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON here")
    given = parser.parse_args()
    found = {name: coverage(name, n_simulations=given.simulations) for name in given.only}
    text = json.dumps({"simulations": given.simulations, **found}, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
