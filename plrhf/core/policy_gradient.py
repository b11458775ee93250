"""Group-relative policy optimisation (GRPO) as pure functions of rewards and log-probabilities."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Advantage = Literal["grpo", "dr_grpo"]

SMALLEST_SPREAD = 1e-4
"""Added to a group's standard deviation, so that equal rewards give advantages of 0."""


def group_advantages(rewards: Tensor, *, kind: Advantage) -> Tensor:
    """Compare each reward with the other rewards of its group, [..., G] -> [..., G].

    ``grpo``: (r - mean) / standard deviation (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).
    ``dr_grpo``: r - mean, so that prompts on which all rewards are close do not count more (Liu et al.
    2025, arXiv 2503.20783).
    """
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    if kind == "dr_grpo":
        return centred
    return centred / (rewards.std(dim=-1, keepdim=True) + SMALLEST_SPREAD)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Return min(rho A, clip(rho, 1 - low, 1 + high) A) for each token.

    Schulman et al. 2017, arXiv 1707.06347, eq. 7; two bounds as in DAPO (Yu et al. 2025, arXiv
    2503.14476, eq. 10), whose upper one is wider so that rare tokens can become likely.

    Args:
        ratio: rho, probability of each token under the policy divided by that under the policy that
            sampled it. advantages: A, of the same shape.
    """
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantages, clipped * advantages)


def kl_estimate(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate the KL divergence from the reference at each sampled token, in nats, never below 0.

    q/p - log(q/p) - 1 for reference q and policy p: Shao et al. 2024, eq. 4. Its mean over tokens that
    the policy samples is KL(p || q) exactly.
    """
    log_ratio = ref_logps - logps
    return torch.expm1(log_ratio) - log_ratio


def token_losses(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    advantages: Tensor,
    *,
    beta: float,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """Return the GRPO loss of each token: beta * KL estimate - clipped surrogate.

    Shao et al. 2024, eq. 3, without its means over tokens and group. All arguments have one shape.

    Args:
        logps, old_logps, ref_logps: log-probability of the token in nats, under the policy, the policy
            that sampled it, and the reference.
    """
    ratio = (logps - old_logps).exp()
    surrogate = clipped_surrogate(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    return beta * kl_estimate(logps, ref_logps) - surrogate


def response_losses(sums: Tensor, lengths: Tensor, *, kind: Advantage, max_tokens: int) -> Tensor:
    """Return the loss of each response from the sum of its tokens' losses.

    ``grpo`` divides by the response's length. ``dr_grpo`` divides all by the same number, the longest
    allowed length, so that long bad responses are not spared.

    Args:
        sums, lengths: loss and number of tokens of each response, of one shape.
    """
    return sums / (lengths.clamp(min=1) if kind == "grpo" else max_tokens)
