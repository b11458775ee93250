"""Preference losses as pure functions from one number a pair to one loss a pair."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from plrhf.core.errors import bad_value

DPO_LOSSES = ("sigmoid", "ipo", "hinge", "cdpo")


def bradley_terry(reward_margin: Tensor, *, target_margin: Tensor | float = 0.0) -> Tensor:
    """Return the negative log-likelihood of each choice under the Bradley-Terry model, in nats.

    -log sigma(r(x, y1, u) - r(x, y2, u) - m): arXiv 2402.05133, the P-RM loss, with the target margin
    m of Llama 2 (arXiv 2307.09288, eq. 2).

    Args:
        reward_margin: [B], reward of the chosen response minus that of the rejected one.
        target_margin: m, one for all or one a pair, as by how much better the chosen response is; 0
            gives the plain likelihood.
    """
    return -logsigmoid(reward_margin - target_margin)


def reward_hinge(reward_margin: Tensor, *, target_margin: Tensor | float = 0.0) -> Tensor:
    """Return the hinge loss of each choice, [B]: relu(1 + m - margin), with the target margin m.

    With m = 0 the loss of PAL-A (Chen et al. 2024, arXiv 2406.08469).
    """
    return torch.relu(1 + target_margin - reward_margin)


def reward_centring(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Return a penalty [B] that keeps rewards near zero.

    Choices fix only differences of rewards, so without it their level drifts.

    (r(x, y1, u) + r(x, y2, u))^2; Eisenstein et al. 2023, arXiv 2312.09244, section 3.
    """
    return (chosen_rewards + rejected_rewards).square()


def dpo_logits(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return log pi(y1)/pi_ref(y1) - log pi(y2)/pi_ref(y2) of each pair, [B], in nats.

    Args:
        policy_logps, ref_logps: [B, 2], log-probabilities of the chosen and the rejected response.
    """
    log_ratios = policy_logps - ref_logps
    return log_ratios[:, 0] - log_ratios[:, 1]


def dpo(
    logits: Tensor, *, beta: float, loss: str = "sigmoid", label_smoothing: float = 0.0
) -> Tensor:
    """Return the direct preference optimisation (DPO) loss of each pair, [B].

    Args:
        logits: [B], what `dpo_logits` returns, in nats.
        beta: how strongly the policy is tied to the reference, > 0.
        loss: with h = logits and b = beta,
            ``sigmoid`` -log sigma(b h) (Rafailov et al. 2023, arXiv 2305.18290, eq. 7);
            ``ipo`` (h - 1/(2b))^2 (Azar et al. 2023, arXiv 2310.12036, eq. 17);
            ``hinge`` relu(1 - b h) (Zhao et al. 2023, arXiv 2305.10425);
            ``cdpo`` -(1-e) log sigma(b h) - e log sigma(-b h), e = label_smoothing
            (Mitchell 2023, "A note on DPO with noisy preferences").
        label_smoothing: probability e that a choice is flipped; used by ``cdpo`` only.
    """
    match loss:
        case "sigmoid":
            return -logsigmoid(beta * logits)
        case "cdpo":
            flipped = label_smoothing
            return -(1 - flipped) * logsigmoid(beta * logits) - flipped * logsigmoid(-beta * logits)
        case "ipo":
            return (logits - 1 / (2 * beta)).square()
        case "hinge":
            return torch.relu(1 - beta * logits)
    raise bad_value("loss", loss, f"one of {', '.join(DPO_LOSSES)}", "Set model.loss=sigmoid")


def contexts(alpha: float) -> tuple[tuple[str, float], ...]:
    """Return the contexts that each pair is scored in, and their weights in the loss.

    These are "user" (alpha) and "generic" (1 - alpha), without a context of weight 0.
    """
    weighted = (("user", alpha), ("generic", 1.0 - alpha))
    return tuple((name, weight) for name, weight in weighted if weight > 0.0)


def mixed(per_context: Tensor, *, alpha: float) -> Tensor:
    """Return alpha * user-specific loss + (1 - alpha) * generic loss of each pair, [B].

    arXiv 2402.05133, the P-RM and P-DPO objectives.

    Args:
        per_context: [C, B], the loss in each of the contexts that `contexts(alpha)` names.
    """
    weights = per_context.new_tensor([weight for _, weight in contexts(alpha)])  # [C]
    return (weights[:, None] * per_context).sum(dim=0)  # a product @ would be autocast
