"""A head of several directions, which users weigh."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from plrhf.core.checks import PositiveFloat, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch
from plrhf.models.heads.base import RewardHead, broadcast_user


@check_arguments("model.head")
class BasisHead(RewardHead):
    """Mixes K directions by the user's K weights, r = sum_k w_uk V_k . h; K is `aggregator.user_dim`.

    LoRe (arXiv 2504.14439) and MRM (arXiv 2601.18731) use softmax weights. PReF (arXiv 2503.06358) and
    RFM (arXiv 2503.17338) use the user's numbers as they are.

    Args:
        weights: ``softmax`` of the user's vector, or ``raw``.
        mixes: what is mixed. ``rewards``. ``probabilities``: sigma(m) = sum_k w_uk sigma(m_k), as if
            one of K people judged each pair (MiCRo, arXiv 2505.24846). ``losses``: the training loss is
            sum_k w_uk -log sigma(m_k), and rewards are mixed afterwards, so that each direction learns
            alone from users weighted by w_uk (HyRe, arXiv 2412.08812). The last two need weights that
            sum to 1.
        scale: factor of all rewards. std: of the initial V; None: 1 / sqrt(d).
        routed: add a linear map of the prompt's hidden state to the user's vector (MiCRo's router).
        shared: add a direction of everybody's, V_0 . h, that starts at zero, so that users' numbers are
            what they differ by (raw weights and mixed rewards only).
        frozen: keep the initial V, see ``model.start``.
    """

    reads_user = True
    shift_cancels = True

    def __init__(
        self,
        *,
        hidden_size: int,
        user_dim: int,
        weights: Literal["softmax", "raw"] = "softmax",
        mixes: Literal["rewards", "probabilities", "losses"] = "rewards",
        scale: PositiveFloat = 1.0,
        std: PositiveFloat | None = None,
        routed: bool = False,
        shared: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.weights, self.mixes, self.scale = weights, mixes, scale
        self.basis = nn.Linear(hidden_size, user_dim, bias=False)  # V, [K, d]
        nn.init.normal_(self.basis.weight, std=hidden_size**-0.5 if std is None else std)
        self.basis.requires_grad_(not frozen)
        self.reads_prompt = routed
        self.router = nn.Linear(hidden_size, user_dim, bias=False) if routed else None
        self.shared = nn.Linear(hidden_size, 1, bias=False) if shared else None
        if self.shared is not None:
            nn.init.zeros_(self.shared.weight)
            if (weights, mixes, routed) != ("raw", "rewards", False):
                allowed = "false unless raw weights mix rewards and no prompt is read"
                raise bad_value("model.head.shared", shared, allowed, "Set model.head.weights=raw")
        if mixes == "probabilities" and weights == "raw":
            raise bad_value(
                "model.head.weights",
                weights,
                "softmax where probabilities are mixed",
                "Set model.head.weights=softmax",
            )

    def read(self, pooled: Tensor) -> Tensor:
        if self.shared is not None:
            return self.scale * torch.cat([self.basis(pooled), self.shared(pooled)], dim=-1)
        if self.router is None:
            return self.scale * self.basis(pooled)
        response, prompt = pooled.chunk(2, dim=-1)
        return torch.cat([self.scale * self.basis(response), self.router(prompt)], dim=-1)

    def parts(self, features: Tensor, user: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reward of each direction, and the weights w_uk, each [C, B, 2, K]."""
        members, weights = features, broadcast_user(user, features)
        if self.router is not None:
            members, route = features.chunk(2, dim=-1)
            weights = weights + route
        if self.shared is not None:
            weights = nn.functional.pad(weights, (0, 1), value=1.0)
        return members.float(), (
            weights.softmax(-1) if self.weights == "softmax" else weights
        ).float()

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        members, weights = self.parts(features, user)
        return (weights * members).sum(-1)

    def compare(
        self, features: Tensor, user: Tensor, batch: PreferenceBatch
    ) -> tuple[Tensor, Tensor]:
        margins, rewards = super().compare(features, user, batch)
        if self.mixes == "rewards" or (self.mixes == "losses" and not self.training):
            return margins, rewards
        members, weights = self.parts(features, user)
        of_member = members[..., 0, :] - members[..., 1, :]  # [C, B, K]
        weights = weights.mean(dim=2)  # prompts of both responses
        if self.mixes == "losses":
            return margin_of_loss((weights * -logsigmoid(of_member)).sum(-1)), rewards
        log_weights = weights.clamp(min=1e-30).log()
        for_chosen, for_rejected = (
            (log_weights + logsigmoid(sign * of_member)).logsumexp(-1) for sign in (1, -1)
        )
        return for_chosen - for_rejected, rewards


def margin_of_loss(loss: Tensor) -> Tensor:
    """Return the margin m whose logistic loss -log sigma(m) is `loss` > 0: -log(exp(loss) - 1)."""
    loss = loss.clamp(min=1e-12)
    return -(loss + torch.log(-torch.expm1(-loss)))
