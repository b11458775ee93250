"""How often the 95% intervals of each likelihood's parameters hold the truth, on simulated people.

    python benchmarks/likelihoods.py                     # 500 simulations of each, some minutes
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
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from plrhf.core.choices import davidson, margins_with_errors, plackett_luce
from plrhf.core.losses import bradley_terry

WEIGHTS = torch.tensor([0.8, -1.2, 0.5], dtype=torch.float64)
"""What everybody likes: reward = w . x of a text with features x."""


class Study(ABC):
    """Answers drawn from known parameters, and the likelihood they are fitted by.

    Attributes:
        truth: true parameters, [P] float64, drawn anew where they have a prior.
    """

    truth: Tensor

    @abstractmethod
    def __init__(self, generator: torch.Generator) -> None:
        """Draw the truth, where it has a prior, and the answers."""

    @abstractmethod
    def loss(self, parameters: Tensor) -> Tensor:
        """Return the negative log-likelihood of all answers, with the prior where there is one."""


def _differences(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, len(WEIGHTS), generator=generator, dtype=torch.float64)


def _happens(probability: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(probability.shape, generator=generator, dtype=torch.float64) < probability


class TieStudy(Study):
    """Four hundred pairs, of which about a third are ties (Davidson's model)."""

    def __init__(self, generator: torch.Generator) -> None:
        log_tie = torch.tensor(0.2, dtype=torch.float64)
        self.truth = torch.cat([WEIGHTS, log_tie[None]])
        self.x = _differences(400, generator)
        margins = self.x @ WEIGHTS
        scores = torch.stack([0.5 * margins, -0.5 * margins, log_tie.expand(400)], dim=1)
        answer = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
        self.is_tie = answer == 2
        self.x[answer == 1] *= -1  # the second response was chosen

    def loss(self, parameters: Tensor) -> Tensor:
        return davidson(self.x @ parameters[:-1], parameters[-1], self.is_tie).sum()


class ErrorStudy(Study):
    """Two thousand choices by somebody who is sure, and answers at random in one case of five."""

    def __init__(self, generator: torch.Generator) -> None:
        error, weights = 0.2, 2.0 * WEIGHTS
        logit = torch.tensor(math.log(error / (1 - error)), dtype=torch.float64)
        self.truth = torch.cat([weights, logit[None]])
        x = _differences(2000, generator)
        chance = (1 - error) * (x @ weights).sigmoid() + 0.5 * error
        self.x = torch.where(_happens(chance, generator)[:, None], x, -x)

    def loss(self, parameters: Tensor) -> Tensor:
        return bradley_terry(margins_with_errors(self.x @ parameters[:-1], parameters[-1])).sum()


class TemperatureStudy(Study):
    """Thirty people with 60 choices each, and log-temperatures from N(0, 0.5^2)."""

    n_people, n_each, spread = 30, 60, 0.5

    def __init__(self, generator: torch.Generator) -> None:
        own = torch.randn(self.n_people, generator=generator, dtype=torch.float64)
        log_temperature = self.spread * own
        self.truth = torch.cat([WEIGHTS, log_temperature])
        self.person = torch.arange(self.n_people).repeat_interleave(self.n_each)
        x = _differences(len(self.person), generator)
        chance = (x @ WEIGHTS / log_temperature[self.person].exp()).sigmoid()
        self.x = torch.where(_happens(chance, generator)[:, None], x, -x)

    def loss(self, parameters: Tensor) -> Tensor:
        weights, log_temperature = parameters[:3], parameters[3:]
        margins = self.x @ weights / log_temperature.exp()[self.person]
        return bradley_terry(margins).sum() + 0.5 * (log_temperature / self.spread).square().sum()


class RankingStudy(Study):
    """A hundred rankings of five responses (Plackett and Luce's model)."""

    n_rankings, n_ranked = 100, 5

    def __init__(self, generator: torch.Generator) -> None:
        self.truth = WEIGHTS
        x = _differences(self.n_rankings * self.n_ranked, generator)
        x = x.unflatten(0, (self.n_rankings, self.n_ranked))
        order = torch.multinomial((x @ WEIGHTS).exp(), self.n_ranked, generator=generator)
        ranked = x.gather(1, order[..., None].expand_as(x))  # drawn in turn without replacement
        first, second = torch.triu_indices(self.n_ranked, self.n_ranked, 1)
        self.x = (ranked[:, first] - ranked[:, second]).flatten(0, 1)
        ranking = torch.arange(self.n_rankings)[:, None]
        self.choice = (ranking * self.n_ranked + first).flatten().unique(return_inverse=True)[1]

    def loss(self, parameters: Tensor) -> Tensor:
        return plackett_luce(self.x @ parameters, self.choice).sum()


STUDIES: dict[str, type[Study]] = {
    "ties": TieStudy,
    "errors": ErrorStudy,
    "temperature": TemperatureStudy,
    "rankings": RankingStudy,
}


def fit(study: Study, *, steps: int = 50) -> tuple[Tensor, Tensor]:
    """Minimise a study's loss by damped Newton steps; return the parameters and their standard errors."""
    at = torch.zeros_like(study.truth)
    at[:3] = 0.1  # where all rewards are zero, nothing says how noisy choices are
    for _ in range(steps):
        gradient = torch.func.grad(study.loss)(at)
        values, basis = torch.linalg.eigh(torch.func.hessian(study.loss)(at))
        step = basis @ ((basis.T @ gradient) / values.abs().clamp(min=1e-3))
        size, before = 1.0, study.loss(at)
        while size > 1e-6 and not study.loss(at - size * step) <= before:
            size /= 2
        at = at - size * step
        if (size * step).abs().max() < 1e-8:
            break
    covariance = torch.linalg.inv(torch.func.hessian(study.loss)(at))
    return at, covariance.diagonal().clamp(min=0).sqrt()


def coverage(name: str, *, n_simulations: int) -> dict[str, float]:
    """Return the share of intervals that hold the truth: of all parameters, the weights, the others."""
    hits = []
    for seed in range(n_simulations):
        study = STUDIES[name](torch.Generator().manual_seed(seed))
        found, error = fit(study)
        hits.append((found - study.truth).abs() <= 1.96 * error)
    each = torch.stack(hits).double().mean(0)
    parts = {"all": each, "weights": each[:3], "others": each[3:]}
    return {kind: round(float(one.mean()), 4) for kind, one in parts.items() if len(one) > 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--simulations", type=int, default=500)
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
