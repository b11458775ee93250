"""Reward heads: they compute rewards from pooled hidden states of responses and the user's vector."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from plrhf.core.checks import PositiveFloat, PositiveInt, check_arguments
from plrhf.core.components import build, named_settings
from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch


class RewardHead(nn.Module, ABC):
    """Computes the rewards of the two responses of each pair.

    A subclass is built by keyword. Its constructor gets its own settings, and the aggregator's
    `hidden_size` and `user_dim` if it has these parameters.

    Attributes:
        reads_user: whether user vectors change the head's rewards.
        reads_prompt: whether `read` gets the prompt's hidden state too.
        shift_cancels: whether a vector added to both hidden states of a pair changes no margin.
    """

    reads_user: bool = False
    reads_prompt: bool = False
    shift_cancels: bool = False

    def read(self, pooled: Tensor) -> Tensor:
        """Compute the features of each text that do not depend on the user, [..., hidden_size] -> [..., F].

        If no user acts before the head, this runs once for each distinct text and not for each pair.

        Args:
            pooled: hidden states in the dtype of the head's weights; with `reads_prompt`, those of the
                prompt are appended, [..., 2 hidden_size].
        """
        return pooled

    @abstractmethod
    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        """Compute rewards [C, B, 2] float32 of chosen and rejected responses.

        Args:
            features: [C, B, 2, F], from `read`, of both responses.
            user: [C * B, user_dim], C contexts one after the other, in the same dtype.
            batch: the B pairs.
        """

    def compare(
        self, features: Tensor, user: Tensor, batch: PreferenceBatch
    ) -> tuple[Tensor, Tensor]:
        """Compute margins [C, B] and rewards [C, B, 2].

        sigma(margin) is the probability that the user prefers the chosen response. By default the
        margin is the difference of rewards. A head with another probability p overrides this with log(p
        / (1 - p)).
        """
        rewards = self(features, user, batch)
        return rewards[..., 0] - rewards[..., 1], rewards

    @property
    def direction(self) -> Tensor | None:
        """The vector w, [hidden_size], if the reward is w . h for all users; else None."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the head's weights."""
        return next((one.dtype for one in self.parameters()), torch.float32)


class LinearHead(RewardHead):
    """Computes the reward r = w . h, the same for all users; users act in the aggregator."""

    shift_cancels = True

    def __init__(self, *, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Linear(hidden_size, 1, bias=False).weight
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    @property
    def direction(self) -> Tensor | None:
        return self.weight[0]

    def read(self, pooled: Tensor) -> Tensor:
        return nn.functional.linear(pooled, self.weight)

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        return features.squeeze(-1).float()


def broadcast_user(user: Tensor, features: Tensor) -> Tensor:
    """Reshape user vectors so that they broadcast over both responses, [C * B, D] -> [C, B, 1, D]."""
    return user.view(*features.shape[:2], 1, -1)


def projector(hidden_size: int, out: int, width: int | None) -> nn.Module:
    """Build a linear map from hidden states; with `width`, a GELU layer of that width comes first."""
    if width is None:
        return nn.Linear(hidden_size, out)
    return nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, out))


@check_arguments("model.head")
class DistanceHead(RewardHead):
    """Computes the reward as the distance from the user's ideal point, r = -|f(h) - e_u|.

    PAL-A of Chen et al. 2024, arXiv 2406.08469, section 3, where e_u is a mixture of K prototypes
    (``encoder=cluster``) and the loss is the hinge (``model.loss=hinge``).

    Args:
        width: of the layer in f; None: f is linear.
    """

    reads_user = True

    def __init__(
        self, *, hidden_size: int, user_dim: int, width: PositiveInt | None = None
    ) -> None:
        super().__init__()
        self.project = projector(hidden_size, user_dim, width)

    def read(self, pooled: Tensor) -> Tensor:
        found: Tensor = self.project(pooled)
        return found

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        away = features - broadcast_user(user, features)
        # The norm has no gradient at 0.
        return -(away.float().square().sum(-1) + 1e-12).sqrt()


@check_arguments("model.head")
class CosineHead(RewardHead):
    """Computes the reward as a scaled cosine, r = exp(s) cos(f(h), u), with a learned s.

    u is the user's vector. With `prompt_width` it also depends on the prompt x: u(x) = sum_k
    softmax(e_u)_k g_k(h_x), with one g_k for each number of e_u. This is PAL-B of Chen et al. 2024,
    arXiv 2406.08469.

    Args:
        width: of the layer in f; None: f is linear.
        prompt_width: of the layer in the g_k; None: u is the user's vector.
        dim: width of f(h) and u(x); without `prompt_width` it is the user vector's.
        temperature: initial exp(-s).
    """

    reads_user = True
    largest_scale = 100.0

    def __init__(
        self,
        *,
        hidden_size: int,
        user_dim: int,
        width: PositiveInt | None = None,
        prompt_width: PositiveInt | None = None,
        dim: PositiveInt = 64,
        temperature: PositiveFloat = 0.07,
    ) -> None:
        super().__init__()
        self.reads_prompt = prompt_width is not None
        dim = dim if self.reads_prompt else user_dim
        self.project = projector(hidden_size, dim, width)
        n_points = user_dim if self.reads_prompt else 0
        self.points = nn.ModuleList(
            projector(hidden_size, dim, prompt_width) for _ in range(n_points)
        )
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def read(self, pooled: Tensor) -> Tensor:
        if not self.reads_prompt:
            return self.project(pooled)
        response, prompt = pooled.chunk(2, dim=-1)
        return torch.cat([self.project(response), *(one(prompt) for one in self.points)], dim=-1)

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        point = broadcast_user(user, features)
        if self.reads_prompt:
            parts = features.unflatten(-1, (1 + len(self.points), -1))  # [C, B, 2, 1 + K, dim]
            features, points = parts[..., 0, :], parts[..., 1:, :]
            point = (points * point.softmax(-1).unsqueeze(-1)).sum(-2)
        cosine = nn.functional.cosine_similarity(features, point, dim=-1)
        return (self.log_scale.exp().clamp(max=self.largest_scale) * cosine).float()


@check_arguments("model.head")
class DecoderHead(RewardHead):
    """Computes the reward by an MLP on [h; e_u] (VPL: Poddar et al. 2024, arXiv 2408.10075).

    With `film` the user also scales and shifts the last layer, x' = (1 + tanh(a_u) / 2) x + tanh(b_u) /
    2 with linear a_u, b_u (SPL's decoder, arXiv 2603.12595).

    Args:
        width: H of the layers.
    """

    reads_user = True

    def __init__(
        self, *, hidden_size: int, user_dim: int, width: PositiveInt = 512, film: bool = False
    ) -> None:
        super().__init__()
        first = max(1, width // 2) if film else width
        self.hidden_size = hidden_size
        self.body = nn.Sequential(
            nn.Linear(hidden_size + user_dim, first),
            nn.LeakyReLU(0.2),
            nn.Linear(first, width),
            nn.LeakyReLU(0.2),
        )
        self.film = nn.Linear(user_dim, 2 * width) if film else None
        self.out = nn.Linear(width, 1)

    def read(self, pooled: Tensor) -> Tensor:
        first: Any = self.body[0]  # the response's share of the first layer
        return nn.functional.linear(pooled, first.weight[:, : self.hidden_size], first.bias)

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        of_user, first = broadcast_user(user, features), self.body[0]
        share = nn.functional.linear(of_user, first.weight[:, self.hidden_size :])  # type: ignore[index]
        features = self.body[1:](features + share)
        if self.film is not None:
            scale, shift = (0.5 * self.film(of_user).tanh()).chunk(2, dim=-1)
            features = (1 + scale) * features + shift
        return self.out(features).squeeze(-1).float()


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
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.weights, self.mixes, self.scale = weights, mixes, scale
        self.basis = nn.Linear(hidden_size, user_dim, bias=False)  # V, [K, d]
        nn.init.normal_(self.basis.weight, std=hidden_size**-0.5 if std is None else std)
        self.basis.requires_grad_(not frozen)
        self.reads_prompt = routed
        self.router = nn.Linear(hidden_size, user_dim, bias=False) if routed else None
        if mixes == "probabilities" and weights == "raw":
            raise bad_value(
                "model.head.weights",
                weights,
                "softmax where probabilities are mixed",
                "Set model.head.weights=softmax",
            )

    def read(self, pooled: Tensor) -> Tensor:
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


@check_arguments("model.head")
class AffineHead(RewardHead):
    """Scales one reward by user, r = (1 + e_u) w . h; `aggregator.user_dim` is 1.

    Per-rater affine maps of a reward model (PEBS, arXiv 2606.27578), without the shift, which does not
    affect choices. The encoder's shrinkage or `optim.user_weight_decay` pulls users to the shared
    scale.
    """

    reads_user = True
    shift_cancels = True

    def __init__(self, *, hidden_size: int, user_dim: int) -> None:
        super().__init__()
        if user_dim != 1:
            raise bad_value(
                "aggregator.user_dim", user_dim, "1, the user's scale", "Set aggregator.user_dim=1"
            )
        self.shared = LinearHead(hidden_size=hidden_size)

    def read(self, pooled: Tensor) -> Tensor:
        return self.shared.read(pooled)

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        scale = 1 + broadcast_user(user, features).squeeze(-1).float()
        return scale * features.squeeze(-1).float()


class MeanVarianceHead(RewardHead):
    """Models the mean and variance of rewards over people, without knowing the user.

    p = Phi((mu_1 - mu_2) / sqrt(s_1^2 + s_2^2)) with the normal Phi (distributional preference learning
    of Siththaranjan et al. 2024, arXiv 2312.08358, the mean-and-variance model).
    """

    def __init__(self, *, hidden_size: int) -> None:
        super().__init__()
        self.mean = LinearHead(hidden_size=hidden_size)
        self.log_std = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.log_std.weight)
        nn.init.zeros_(self.log_std.bias)

    def read(self, pooled: Tensor) -> Tensor:
        return torch.cat([self.mean.read(pooled), self.log_std(pooled)], dim=-1)

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        return features[..., 0].float()

    def compare(
        self, features: Tensor, user: Tensor, batch: PreferenceBatch
    ) -> tuple[Tensor, Tensor]:
        difference, rewards = super().compare(features, user, batch)
        variance = (2 * features[..., 1].float()).exp().sum(-1)  # [C, B]
        z = difference / variance.sqrt()
        return torch.special.log_ndtr(z) - torch.special.log_ndtr(-z), rewards


HEADS: dict[str, type[RewardHead]] = {
    "linear": LinearHead,
    "distance": DistanceHead,
    "cosine": CosineHead,
    "decoder": DecoderHead,
    "basis": BasisHead,
    "affine": AffineHead,
    "mean_variance": MeanVarianceHead,
}


def head_settings(head: object) -> dict[str, Any]:
    """Return ``model.head``, a name of `HEADS` or a mapping, as a mapping with ``_target_``."""
    return named_settings(head, HEADS, "model.head", "linear")


def build_head(
    head: str | Mapping[str, Any] | RewardHead, *, hidden_size: int, user_dim: int
) -> RewardHead:
    """Build the head of ``model.head`` for an aggregator's hidden states and user vectors."""
    if isinstance(head, RewardHead):
        return head
    settings = head_settings(head)
    found: RewardHead = build(
        settings, "model.head", kind=RewardHead, hidden_size=hidden_size, user_dim=user_dim
    )
    return found
