"""A head that lets each response attend to the user's pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from plrhf.core.checks import PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch
from plrhf.models.heads.base import RewardHead, projector


@check_arguments("model.head")
class AttendHead(RewardHead):
    """Computes the reward by a transformer in which a response attends to those in the user's pairs.

    GPO (Zhao et al. 2024, arXiv 2310.11523), whose context points are here the chosen and rejected
    responses of the user's pairs, and whose target is the response. All tokens attend to the context only,
    and to one learned token, which is all there is for a user without pairs.

    Args:
        user_dim: pairs * (2 width + 1), what ``encoder=pair_tokens`` makes of the pairs.
        pairs: largest number of pairs. width: of tokens. layers, attention_heads: of the transformer.
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
        attention_heads: PositiveInt = 4,
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
            width, attention_heads, dim_feedforward=4 * width, dropout=0.0, batch_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, 1)

    def read(self, pooled: Tensor) -> Tensor:
        found: Tensor = self.target(pooled)
        return found

    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        given = user.unflatten(-1, (self.pairs, -1))  # [C * B, k, 2 * width + 1]
        n_users = len(given)
        tokens = given[..., :-1].unflatten(-1, (2, -1)).flatten(1, 2)  # [C * B, 2 k, width]
        absent = (given[..., -1:] < 0.5).expand(-1, -1, 2).flatten(1)  # [C * B, 2 k]
        targets = features.flatten(0, 1)  # [C * B, 2, width]
        sequence = torch.cat([self.nobody.expand(n_users, -1, -1), tokens, targets], dim=1)
        there = absent.new_zeros(n_users, 1)
        unseen = torch.cat([there, absent, absent.new_ones(n_users, 2)], dim=1)
        *before, last = self.transformer.layers
        with sdpa_kernel(SDPBackend.MATH):  # of which alone many models are one call
            for layer in before:
                sequence = layer(sequence, src_key_padding_mask=unseen)
            found = last_tokens(last, sequence, unseen, n=2)
        return self.out(found).squeeze(-1).view(features.shape[:3]).float()


def last_tokens(
    layer: nn.TransformerEncoderLayer, tokens: Tensor, unseen: Tensor, *, n: int
) -> Tensor:
    """Compute what a layer makes of the last n tokens only, [B, L, width] -> [B, n, width].

    Args:
        layer: without dropout, which normalises after each part.
        unseen: tokens that none attends to, [B, L] bool.
    """
    asked = tokens[:, -n:]
    attended, _ = layer.self_attn(
        asked, tokens, tokens, key_padding_mask=unseen, need_weights=False
    )
    asked = layer.norm1(asked + attended)
    return layer.norm2(asked + layer.linear2(layer.activation(layer.linear1(asked))))
