"""Users described by their features and by an offset of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from plrhf.core.checks import NonNegativeFloat, PositiveInt, check_arguments
from plrhf.core.shrinkage import ShrinkageKind
from plrhf.core.types import UserBatch
from plrhf.encoders.base import Init, UserEncoder
from plrhf.encoders.features import FeatureMLPEncoder
from plrhf.encoders.lookup import LookupEncoder


@check_arguments("encoder")
class HybridEncoder(UserEncoder):
    """Adds an offset of each user to the vector that the user's features predict.

    e_u = e_0 + MLP(features of u) + o_u. Both parts are shrunk, with separate priors. The offset is
    what the features do not explain; an unseen user has o_u = 0.

    Args:
        hidden: of `FeatureMLPEncoder`. rank, offset_scale: of `LookupEncoder`. init, shrinkage: of
            both.
    """

    penalty_weight = 1.0

    def __init__(
        self,
        *,
        n_users: int,
        user_dim: int,
        n_numbers: int,
        category_sizes: Sequence[int],
        vocabulary: Tensor,
        hidden: PositiveInt = 64,
        rank: PositiveInt | None = None,
        init: Init = "vocabulary",
        offset_scale: NonNegativeFloat = 0.1,
        shrinkage: ShrinkageKind = "fixed",
    ) -> None:
        super().__init__()
        self.known = FeatureMLPEncoder(
            user_dim=user_dim,
            n_numbers=n_numbers,
            category_sizes=category_sizes,
            vocabulary=vocabulary,
            hidden=hidden,
            init=init,
            shrinkage=shrinkage,
        )
        self.own = LookupEncoder(
            n_users=n_users,
            user_dim=user_dim,
            vocabulary=vocabulary,
            rank=rank,
            init=init,
            offset_scale=offset_scale,
            shrinkage=shrinkage,
        )
        nn.init.zeros_(self.own.generic_vector).requires_grad_(False)  # e_0 is that of `known`

    def count_pairs(self, pairs_per_user: Tensor) -> None:
        for part in (self.known, self.own):
            part.count_pairs(pairs_per_user)

    def forward(self, users: UserBatch) -> Tensor:
        vectors: Tensor = self.known(users) + self.own(users)
        return vectors

    def encode(self, users: UserBatch) -> tuple[Tensor, Tensor | None]:
        expected, first = self.known.encode(users)
        offset, second = self.own.encode(users)
        penalty = None if first is None or second is None else torch.add(first, second)
        return expected + offset, penalty

    def generic(self, batch_size: int) -> Tensor:
        return self.known.generic(batch_size)

    def user_parameters(self) -> Iterable[nn.Parameter]:
        return self.own.user_parameters()
