"""Users described by their features, so that unseen users have a vector too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from plrhf.core.checks import FractionBelowOne, PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.shrinkage import ShrinkageKind
from plrhf.core.types import UserBatch
from plrhf.encoders.base import Init, ShrunkEncoder, initial_vectors


@check_arguments("encoder")
class FeatureMLPEncoder(ShrunkEncoder):
    """Computes a user's vector from the user's features (arXiv 2402.05133, section 4).

    e_u = e_0 + MLP(features of u), and e_0 for a user without features.

    Args:
        n_numbers: the first columns of `UserBatch.features`, standardised, NaN if missing. Each enters
            the MLP as (value or 0, is missing).
        category_sizes: number of levels of each remaining column, codes from 0, NaN if missing. Each
            enters as a learned embedding, or as the zero vector if missing.
        hidden: width of the hidden layer. rank: width of a bottleneck before e_u, or None.
        category_dim: width of a category's embedding.
        init: initial e_0; see `initial_vectors`.
        shrinkage: of the bottleneck's numbers (without one, of e_u - e_0); see `ShrunkEncoder`.

    Raises:
        ValueError: there are no features.
    """

    def __init__(
        self,
        *,
        user_dim: int,
        n_numbers: int,
        category_sizes: Sequence[int],
        vocabulary: Tensor,
        hidden: PositiveInt = 64,
        rank: PositiveInt | None = None,
        category_dim: PositiveInt = 8,
        dropout: FractionBelowOne = 0.0,
        init: Init = "vocabulary",
        shrinkage: ShrinkageKind = "fixed",
    ) -> None:
        super().__init__()
        if n_numbers + len(category_sizes) == 0:
            raise bad_value(
                "encoder",
                "features",
                "rows with user_features",
                "Give the rows user_features, or set encoder=lookup",
            )
        self.n_numbers = n_numbers
        first = initial_vectors(1, user_dim, init=init, vocabulary=vocabulary)
        self.generic_vector = nn.Parameter(first[0])  # [user_dim]
        # Level 0 is "missing" and stays the zero vector.
        self.categories = nn.ModuleList(
            nn.Embedding(size + 1, category_dim, padding_idx=0) for size in category_sizes
        )
        width = 2 * n_numbers + category_dim * len(category_sizes)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, user_dim if rank is None else rank, bias=False),
        )
        self.basis = None if rank is None else nn.Linear(rank, user_dim, bias=False)
        self.learn_shrinkage(shrinkage, user_dim if rank is None else rank, self.generic_vector)

    @property
    def same_for_user(self) -> bool:
        return False  # rows may give a user other features, and dropout differs by pair

    def numbers(self, users: UserBatch) -> Tensor:
        missing = users.features.isnan()  # [B, F]
        numbers, codes = users.features.nan_to_num(0.0).split(
            [self.n_numbers, len(self.categories)], dim=1
        )
        levels = torch.where(missing[:, self.n_numbers :], 0, codes.long() + 1)
        embedded = [table(levels[:, column]) for column, table in enumerate(self.categories)]
        known = torch.cat([numbers, missing[:, : self.n_numbers].float(), *embedded], dim=1)
        anything = (~missing).any(dim=1, keepdim=True)
        own: Tensor = anything * self.mlp(known)
        return own

    def vectors(self, numbers: Tensor) -> Tensor:
        return self.generic_vector + (numbers if self.basis is None else self.basis(numbers))

    def generic(self, batch_size: int) -> Tensor:
        return self.generic_vector.expand(batch_size, -1)

    def user_parameters(self) -> Iterable[nn.Parameter]:
        return ()
