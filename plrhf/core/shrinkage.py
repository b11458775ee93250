"""Learned shrinkage: how far rows of numbers are pulled towards zero is learned from the rows themselves.

A user's numbers z have the prior N(0, diag(s_j^2)). What the choices say of them is kept as a normal
distribution around the learned z, and training maximises a lower bound on the likelihood of the
choices with z integrated out, over z, its spread and s (variational empirical Bayes; for products
of two factors, Nakajima et al. 2013, JMLR 14, "Global analytic solution of fully-observed variational
Bayesian matrix factorization"). A direction in which the choices say nothing has z_j, and then s_j, fall to
zero: it switches itself off.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

ShrinkageKind = Literal["learned", "fixed"]

BITS = 2**32 - 1

STEP_FACTOR = 0x85EBCA6B
"""Odd, so that the noise of different steps begins at different hashes."""

FIRST_INFORMATION = 0.05
"""Information of a pair on a number of unit prior variance at the start; it is learned from there."""


def posterior_variance(n_pairs: Tensor, information: Tensor, prior_variance: Tensor) -> Tensor:
    """Return the variance of numbers after n pairs: 1 / (n * information + 1 / prior variance).

    Args:
        information: that one pair gives on the number, the mean of sigma'(m) (dm/dz)^2.
        others: broadcast against it.
    """
    return 1.0 / (n_pairs * information + 1.0 / prior_variance)


def divergence(mean: Tensor, variance: Tensor, prior_variance: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of N(mean, variance) from N(0, prior variance), in nats.

    Its minimum over the prior variance of many rows is their mean of mean^2 + variance, the M-step of
    EM. Elementwise; the arguments are broadcast.
    """
    ratio = variance / prior_variance
    return 0.5 * (mean.square() / prior_variance + ratio - 1.0 - ratio.log())


def hashed(state: Tensor, number: Tensor | int) -> Tensor:
    """Mix a whole number into a hash from 0 to 2^32 - 1, alike on every device; the two broadcast.

    The steps are those of lowbias32 (https://github.com/skeeto/hash-prospector).
    """
    state = (state + 0x9E3779B9 ^ number) & BITS
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        state = (state ^ (state >> shift)) * factor & BITS
    return state ^ (state >> 16)


def hashed_normal(state: Tensor, *numbers: Tensor) -> Tensor:
    """Return a standard normal number, float32, for each combination of whole numbers, which broadcast.

    By Box and Muller from two uniform numbers, the halves of a hash.
    """
    for number in numbers:
        state = hashed(state, number)
    first, second = ((half.float() + 0.5) / 2**16 for half in (state >> 16, state & 2**16 - 1))
    return (-2.0 * first.log()).sqrt() * (2.0 * math.pi * second).cos()


class Shrinkage(nn.Module):
    """The prior of rows of numbers and how well the choices determine them, both learned.

    Args:
        directions: r, numbers a row.
        rows: None: all rows share r values of information a pair, as users do. A number: each of so many
            rows has its own, as the rows of a weight do.

    Attributes:
        log_prior: log s_j^2, [r]. log_information: [r] or [rows, r].
        weight: of the divergence in the loss, which may grow from 0 to 1 in training, so that rows can
            grow before it is asked whether they are worth it.
        step: of training, which noise depends on. seed: of the noise.
    """

    weight: Tensor
    step: Tensor
    seed: Tensor

    def __init__(self, directions: int, *, rows: int | None = None) -> None:
        super().__init__()
        shape = (directions,) if rows is None else (rows, directions)
        self.log_prior = nn.Parameter(torch.zeros(directions))
        self.log_information = nn.Parameter(torch.full(shape, FIRST_INFORMATION).log())
        self.register_buffer("weight", torch.ones(()), persistent=False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("seed", torch.randint(2**31, ()), persistent=False)

    def variance(self, n_pairs: Tensor) -> Tensor:
        """Return the posterior variance of rows of which there are n_pairs [..., 1] pairs, [..., r]."""
        return posterior_variance(n_pairs, self.log_information.exp(), self.log_prior.exp())

    def sample(self, rows: Tensor, n_pairs: Tensor, places: Tensor | None = None) -> Tensor:
        """Draw rows [B, r] from their posterior; training on draws charges what is uncertain.

        Args:
            places: of the rows among all that are drawn in this step, [B] int64; None: 0, 1, ... The noise
                depends on them, on the step and on the seed alone, so that any number of processes draw
                alike and a resumed run goes on alike.
        """
        own = torch.arange(len(rows), device=rows.device) if places is None else places
        columns = torch.arange(rows.shape[-1], device=rows.device)
        first = (
            self.seed + self.step * STEP_FACTOR
        )  # every operation counts: they are small and many
        noise = hashed_normal(first, own[:, None], columns)
        return rows + noise.to(rows.dtype) * self.variance(n_pairs).sqrt()

    def forward(self, rows: Tensor, n_pairs: Tensor) -> Tensor:
        """Return the divergence of rows [..., r] from their prior for each of their pairs, [...].

        Added to the loss of every pair of a row, it is charged once a row.
        """
        each = divergence(rows, self.variance(n_pairs), self.log_prior.exp())
        return self.weight * (each / n_pairs).sum(dim=-1)


class ShrunkLinear(nn.Linear):
    """A linear map without bias whose columns are shrunk: an input that is of no use switches off.

    Attributes:
        n_pairs: train pairs, which `count_pairs` sets before training.
        penalty: divergence of the weights from their prior, a pair, of the last draw in training.
    """

    n_pairs: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.shrinkage = Shrinkage(in_features, rows=out_features)
        self.penalty: Tensor | None = None
        self.register_buffer("n_pairs", torch.ones(1), persistent=False)

    def drawn_weight(self) -> Tensor:
        """Return the weights; in training draw them from their posterior, and set `penalty`."""
        if not self.training:
            return self.weight
        self.penalty = self.shrinkage(self.weight, self.n_pairs).sum()
        return self.shrinkage.sample(self.weight, self.n_pairs)

    def forward(self, values: Tensor) -> Tensor:
        return nn.functional.linear(values, self.drawn_weight())
