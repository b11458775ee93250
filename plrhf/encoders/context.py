"""Users as a distribution inferred from their pairs by a network: variational preference learning."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from plrhf.core.checks import NonNegativeFloat, PositiveInt, check_arguments
from plrhf.core.types import UserContext, is_fake
from plrhf.encoders.pair_reader import PairReader

LIMIT = 1.0
"""Largest absolute value of a component's mean and log-variance."""

SPREAD_WEIGHT = 0.1
"""Weight of the cosine of log-variances in the guide loss, relative to that of means."""


@check_arguments("encoder")
class ContextEncoder(PairReader):
    """Infers N(mu, sigma^2) of a user's vector from a set of their pairs; training samples from it.

    Poddar et al. 2024, arXiv 2408.10075 (VPL): an MLP encodes each pair, one self-attention relates the
    pairs, and their mean gives mu and log sigma^2. KL(N(mu, sigma^2) || N(0, 1)) is the penalty. In
    evaluation e_u = mu. `guide_weight` adds the guide loss of arXiv 2603.12595 (SPL): the same pairs
    with chosen and rejected swapped should give the opposite mean and the same spread. Not implemented
    are VPL's rescaling of samples to length sqrt(user_dim), which its evaluation does not use, its
    cyclic KL weight, and SPL's normalising flow.

    Args:
        hidden_size: width of `UserContext.hidden`. width: of the network's layers.
        reads: ``pair``: the MLP gets both responses together (VPL); ``response``: each alone (SPL).
        kl_weight, guide_weight: weights of the two penalties in the training loss.
        others: see `PairReader`.
    """

    penalty_weight = 1.0

    def __init__(
        self,
        *,
        user_dim: int,
        hidden_size: int,
        width: PositiveInt = 64,
        reads: Literal["pair", "response"] = "pair",
        kl_weight: NonNegativeFloat = 1e-4,
        guide_weight: NonNegativeFloat = 0.0,
        **reader: Any,
    ) -> None:
        super().__init__(user_dim=user_dim, **reader)
        self.reads, self.kl_weight, self.guide_weight = reads, kl_weight, guide_weight
        # Of a pair the first layer is a sum over its responses, so it runs once a distinct text.
        n_sides = 2 if reads == "pair" else 1
        self.sides = nn.ModuleList(nn.Linear(hidden_size, width) for _ in range(n_sides))
        self.layers = nn.Sequential(
            nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, width)
        )
        entry = width if reads == "pair" else 2 * width
        self.queries = nn.Linear(entry, width, bias=False)
        self.keys = nn.Linear(entry, width, bias=False)
        self.values = nn.Linear(entry, width, bias=False)
        self.mean, self.log_variance = (nn.Linear(width, user_dim) for _ in range(2))

    def read(self, context: UserContext) -> tuple[Tensor, Tensor | None]:
        table = self._table(context.hidden)
        mean, log_variance = self._posterior(context, table)
        if not self.training:
            return mean, None
        penalty = self.kl_weight * kl_from_standard_normal(mean, log_variance)
        if self.guide_weight > 0:
            with torch.no_grad():
                opposite = self._posterior(context.swapped, table)
            penalty = penalty + self.guide_weight * swap_guide((mean, log_variance), opposite)
        return mean + (0.5 * log_variance).exp() * torch.randn_like(mean), penalty

    def posterior(self, context: UserContext) -> tuple[Tensor, Tensor]:
        """Compute mu and log sigma^2, each [B, user_dim] and bounded by `LIMIT`."""
        return self._posterior(context, self._table(context.hidden))

    def _posterior(self, context: UserContext, table: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Do as `posterior`, given `_table`."""
        pool = self._pooled_pairs if self.reads == "pair" else self._pooled_responses
        pooled = pool(context.texts, context.present, table)
        return (
            self.mean(pooled).clamp(-LIMIT, LIMIT),
            self.log_variance(pooled).clamp(-LIMIT, LIMIT),
        )

    def _table(self, hidden: Tensor) -> list[Tensor]:
        """Compute what pairs are made of once a distinct text.

        Returns:
            Of texts as chosen ones and as rejected ones: ``reads=pair``: sides of the first layer, two
            tensors [M, width]; ``reads=response``: queries and keys, two of [M, 2 width], and values, two
            of [M, width].
        """
        if self.reads == "pair":
            return [side(hidden) for side in self.sides]
        of_text = self.layers(self.sides[0](hidden))  # [M, width]
        asking = torch.cat([self.queries.weight, self.keys.weight])
        layers = (asking, self.values.weight)
        return [of_text @ side.T for layer in layers for side in layer.chunk(2, dim=1)]

    def _shares(self, scores: Tensor, present: Tensor) -> Tensor:
        """Compute the share of each pair in the mean over pairs of what each attends to, [B, k].

        Args:
            scores: products of queries and keys, [B, k, k]. present: [B, k].
        """
        scores = scores * self.keys.out_features**-0.5
        absent = ~present[:, None, :]  # [B, 1, k]
        attention = scores.masked_fill(absent, torch.finfo(scores.dtype).min).softmax(dim=-1)
        asking = present / present.sum(dim=1, keepdim=True).clamp(min=1)  # [B, k]
        return (asking[:, None] @ attention)[:, 0]

    def _pooled_pairs(self, texts: Tensor, present: Tensor, table: list[Tensor]) -> Tensor:
        """Encode each pair, and return the mean of the values that pairs attend to, [B, width]."""
        # On a GPU, pairs that are not there cost less than to wait for numbers.
        there = None if present.is_cuda or is_fake(present) else present.flatten().nonzero()[:, 0]
        if there is not None:
            texts = texts.flatten(0, 1)[there]
        chosen, rejected = map(nn.functional.embedding, texts.unbind(dim=-1), table)
        pairs = self.layers(chosen + rejected)
        asking = pairs @ (self.queries.weight.T @ self.keys.weight)  # of all keys at once
        if there is not None:
            both = torch.cat([pairs, asking], dim=-1)
            padded = both.new_zeros(present.numel(), both.shape[1]).index_copy(0, there, both)
            pairs, asking = padded.view(*present.shape, both.shape[1]).chunk(2, dim=-1)
        share = self._shares(asking @ pairs.mT, present)
        # Values are linear, so that the mean comes first.
        pooled: Tensor = self.values((share[:, None] @ pairs)[:, 0])
        return pooled

    def _pooled_responses(self, texts: Tensor, present: Tensor, table: list[Tensor]) -> Tensor:
        """Do as `_pooled_pairs`, where of a pair there are only sums over both responses."""
        sides = texts.unbind(dim=-1)
        chosen, rejected = map(nn.functional.embedding, sides, table[:2])
        queries, keys = (chosen + rejected).chunk(2, dim=-1)
        share = self._shares(queries @ keys.mT, present)

        starts = texts.shape[1] * torch.arange(len(texts), device=texts.device)

        def mean(of_side: Tensor, values: Tensor) -> Tensor:
            return nn.functional.embedding_bag(
                of_side.flatten(),
                values,
                starts,
                mode="sum",
                per_sample_weights=share.flatten(),
            )

        return mean(sides[0], table[2]) + mean(sides[1], table[3])


def kl_from_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, summed over components, [B]."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1)


def swap_guide(own: tuple[Tensor, Tensor], opposite: tuple[Tensor, Tensor]) -> Tensor:
    """Return a penalty [B], which is 0 if swapping all chosen and rejected texts reverses the vector.

    (1 + cos(mu, mu~)) / 2 + 0.1 (1 - cos(log sigma^2, log sigma~^2)) / 2; arXiv 2603.12595.

    Args:
        own, opposite: mean and log-variance for the user's pairs, and for the same pairs with chosen
            and rejected swapped.
    """
    means, spreads = (cosine_similarity(a, b, dim=-1) for a, b in zip(own, opposite, strict=True))
    return 0.5 * (1 + means) + SPREAD_WEIGHT * 0.5 * (1 - spreads)
