"""A head that lets each response attend to the user's pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plrhf.core.checks import PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch
from plrhf.models.heads.base import RewardHead, projector

STEP = 4
"""Users whose numbers of pairs differ by less than this are computed together."""


@check_arguments("model.head")
class AttendHead(RewardHead):
    """Computes the reward by a transformer in which a response attends to those in the user's pairs.

    GPO (Zhao et al. 2024, arXiv 2310.11523), whose context points are here the chosen and rejected
    responses of the user's pairs, and whose target is the response. All tokens attend to the context only,
    and to one learned token, which is all there is for a user without pairs.

    Args:
        user_dim: pairs * (2 width + 1), what ``encoder=pair_tokens`` makes of the pairs.
        pairs: largest number of pairs. width: of tokens and, as the authors have it, of hidden layers.
        layers, attention_heads: of the transformer; the authors' heads have width 32, here one head.
    """

    reads_user = True

    def __init__(
        self,
        *,
        hidden_size: int,
        user_dim: int,
        pairs: PositiveInt = 16,
        width: PositiveInt = 32,
        layers: PositiveInt = 2,
        attention_heads: PositiveInt = 1,
    ) -> None:
        super().__init__()
        if user_dim != pairs * (2 * width + 1):
            raise bad_value(
                "aggregator.user_dim",
                user_dim,
                f"{pairs} * (2 * {width} + 1), room for the tokens of {pairs} pairs",
                f"Set aggregator.user_dim={pairs * (2 * width + 1)}",
            )
        self.pairs = pairs
        self.target = projector(hidden_size, width, width)
        self.nobody = nn.Parameter(torch.zeros(1, 1, width))
        layer = nn.TransformerEncoderLayer(
            width, attention_heads, dim_feedforward=width, dropout=0.0, batch_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, 1)

    def read(self, pooled: Tensor) -> Tensor:
        found: Tensor = self.target(pooled)
        return found

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        given = user.unflatten(-1, (self.pairs, -1))  # [C * B, k, 2 * width + 1]
        targets = features.flatten(0, 1)  # [C * B, 2, width]
        counts = (given[..., -1] >= 0.5).sum(dim=1)
        # On a GPU, tokens for pairs that are not there cost less than to wait for numbers.
        if counts.is_cuda:
            return self._rewards(given, counts, targets).view(features.shape[:3]).float()
        # Users with about as many pairs go together, so that few tokens stand for pairs that are not there.
        steps = (counts + STEP - 1) // STEP
        order, sizes = steps.argsort(stable=True), steps.bincount().tolist()
        # Of users without pairs no token is read, so that any rows will do.
        of_users = [given[: sizes[0]], *given[order[sizes[0] :]].split(sizes[1:])]
        parts = zip(of_users, counts[order].split(sizes), targets[order].split(sizes), strict=True)
        found = [
            self._rewards(pairs[:, : n * STEP], of_pairs, asked)
            for n, (pairs, of_pairs, asked) in enumerate(parts)
        ]
        rewards = torch.cat(found)[order.argsort()]
        return rewards.view(features.shape[:3]).float()

    def _rewards(self, given: Tensor, counts: Tensor, targets: Tensor) -> Tensor:
        """Compute the rewards [B, 2] of responses for users with at most n pairs each.

        Args:
            given: tokens of both responses, and whether there is a pair, [B, n, 2 * width + 1].
            counts: of each user's pairs, which come first, [B]. targets: [B, 2, width].
        """
        tokens = given[..., :-1].unflatten(-1, (2, -1)).flatten(1, 2)  # [B, 2 n, width]
        context = torch.cat([self.nobody.expand(len(tokens), -1, -1), tokens], dim=1)
        place = torch.arange(context.shape[1], device=counts.device)
        absent = place > 2 * counts[:, None]  # [B, 2 n + 1]
        bias = torch.zeros_like(absent, dtype=context.dtype).masked_fill(absent, -torch.inf)
        *before, last = self.transformer.layers
        for layer in before:
            both = apply_layer(layer, torch.cat([context, targets], dim=1), context, bias)
            context, targets = both[:, :-2], both[:, -2:]
        found: Tensor = self.out(apply_layer(last, targets, context, bias)).squeeze(-1)
        return found


def apply_layer(
    layer: nn.TransformerEncoderLayer, asking: Tensor, context: Tensor, bias: Tensor
) -> Tensor:
    """Compute what a layer makes of tokens [B, L, width] that attend to others, [B, M, width].

    Products of matrices cost less here than `nn.MultiheadAttention`, which copies tokens to other layouts.

    Args:
        layer: without dropout, which normalises after each part.
        bias: added to the scores of the context's tokens, [B, M].
    """
    attention = layer.self_attn
    n_heads, width = attention.num_heads, asking.shape[-1]
    of_asking, of_context = attention.in_proj_weight.split([width, 2 * width])
    of_queries, biases = attention.in_proj_bias.split([width, 2 * width])
    queries = nn.functional.linear(asking, of_asking, of_queries).unflatten(-1, (n_heads, -1))
    found = nn.functional.linear(context, of_context, biases).unflatten(-1, (2, n_heads, -1))
    keys, values = found.unbind(dim=2)  # [B, M, heads, width / heads]
    scores = (queries * queries.shape[-1] ** -0.5).transpose(1, 2) @ keys.permute(0, 2, 3, 1)
    scores = scores + bias[:, None, None, :]
    attended = (scores.softmax(dim=-1) @ values.transpose(1, 2)).transpose(1, 2).flatten(-2)
    asking = layer.norm1(asking + attention.out_proj(attended))
    return layer.norm2(asking + layer.linear2(layer.activation(layer.linear1(asking))))
