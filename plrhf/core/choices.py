"""Likelihoods of answers beyond a plain choice, as pure functions of log-odds."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def davidson(margins: Tensor, log_tie: Tensor, is_tie: Tensor) -> Tensor:
    """Return the negative log-likelihood of choices and ties, in nats; the arguments are broadcast.

    P(first) : P(second) : P(tie) = e^{m/2} : e^{-m/2} : nu, with the tie parameter nu >= 0 (Davidson
    1970, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments",
    with pi = e^r). With nu = 0 it is the Bradley-Terry model.

    Args:
        margins: m, reward of the first response minus that of the second, which is chosen if any is.
        log_tie: log nu. is_tie: whether the answer was a tie, bool.
    """
    either = torch.logaddexp(0.5 * margins, -0.5 * margins)  # log(e^{m/2} + e^{-m/2})
    tie_odds = log_tie - either  # log odds of a tie
    chosen = softplus(tie_odds) - logsigmoid(margins)
    return torch.where(is_tie, softplus(-tie_odds), chosen)


def margins_with_errors(margins: Tensor, error_logit: Tensor) -> Tensor:
    """Return the log-odds of a choice by somebody who answers at random with probability e.

    P(first) = (1 - e) sigma(m) + e / 2, the lapse rate of psychometric functions (Wichmann and Hill
    2001, doi 10.3758/BF03194544, eq. 1, with guesses on both sides). Log-odds stay between
    -+log((2 - e) / e), so a single odd choice costs little.

    Args:
        margins: m, log-odds without errors. error_logit: log(e / (1 - e)); the two are broadcast.
    """
    careful, guess = logsigmoid(-error_logit), logsigmoid(error_logit) - math.log(2.0)
    first = torch.logaddexp(careful + logsigmoid(margins), guess)
    second = torch.logaddexp(careful + logsigmoid(-margins), guess)
    return first - second


def plackett_luce(margins: Tensor, choice: Tensor) -> Tensor:
    """Return the negative log-likelihood of choices among several responses, in nats, [..., B].

    A choice of r_j among r_j, ..., r_k has P = e^{r_j} / sum_{l >= j} e^{r_l}, that is -log P = log(1 +
    sum_{l > j} e^{-(r_j - r_l)}), which needs margins of pairs alone. A ranking is the choice of its best
    response, of the best of the others, and so on (Plackett 1975, "The analysis of permutations"; Luce
    1959, "Individual choice behavior"). A choice of one pair is the Bradley-Terry model's.

    Args:
        margins: r_j - r_l of the pairs of all choices, [..., B].
        choice: number of each pair's choice, [B] int64 from 0 to B - 1.

    Returns:
        Each choice's loss in equal parts on its pairs.
    """
    index = choice.expand_as(margins)
    zeros = torch.zeros_like(margins)
    largest = zeros.scatter_reduce(-1, index, -margins.detach(), "amax")  # with the 0 of the chosen
    others = (-margins - largest.gather(-1, index)).exp()
    total = (-largest).exp().scatter_add(-1, index, others)
    n_pairs = zeros.scatter_add(-1, index, torch.ones_like(margins)).clamp(min=1)
    return ((largest + total.log()) / n_pairs).gather(-1, index)


def cumulative_logit(latent: Tensor, level: Tensor, thresholds: Tensor) -> Tensor:
    """Return the negative log-likelihood of ratings on an ordered scale, in nats, [..., B].

    P(rating <= k) = sigma(theta_k - r) with increasing thresholds theta (McCullagh 1980, "Regression models
    for ordinal data", the proportional odds model). With two levels it is the logistic model.

    Args:
        latent: r, [..., B]. level: of each rating, from 0 to K - 1, int64; broadcast against it.
        thresholds: theta_0 < ... < theta_{K-2}, [..., B, K - 1].
    """
    level = level.expand_as(latent)[..., None]
    distances = thresholds - latent[..., None]  # [..., B, K - 1]
    last = thresholds.shape[-1]
    above = distances.gather(-1, level.clamp(max=last - 1))[..., 0]
    below = distances.gather(-1, (level - 1).clamp(min=0))[..., 0]
    level = level[..., 0]
    gap = torch.where((level > 0) & (level < last), above - below, torch.ones_like(above))
    # sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - e^{b - a})
    found = -torch.log(-torch.expm1(-gap)).masked_fill((level == 0) | (level == last), 0.0)
    found = found - logsigmoid(above).masked_fill(level == last, 0.0)
    return found - logsigmoid(-below).masked_fill(level == 0, 0.0)
