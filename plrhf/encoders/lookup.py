"""A learned vector for each user, looked up by index."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from plrhf.core.checks import NonNegativeFloat, PositiveInt, check_arguments
from plrhf.core.shrinkage import ShrinkageKind
from plrhf.core.types import GENERIC_USER, UserBatch
from plrhf.encoders.base import Init, ShrunkEncoder, initial_vectors


@check_arguments("encoder")
class LookupEncoder(ShrunkEncoder):
    """Learns one vector a user (arXiv 2402.05133, individualized preference).

    e_u = e_0 + o_u with o_0 = 0. With `rank` r, o_u = z_u S, where z_u has r numbers and S [r,
    user_dim] is shared, so that a few pairs a user suffice.

    Args:
        n_users: number of train users, with indices from 1.
        rank: r; o_u has full width if it is None or at least `user_dim`.
        init: initial e_0, and initial o_u (or S); see `initial_vectors`.
        shrinkage: of z_u (or o_u), see `ShrunkEncoder`.
        offset_scale: factor on the initial o_u, so that users start near the generic user.
        sparse: update only the rows of a batch's users (see `optim.RowAdamW`), for many users.
    """

    def __init__(
        self,
        *,
        n_users: int,
        user_dim: int,
        vocabulary: Tensor,
        rank: PositiveInt | None = None,
        init: Init = "vocabulary",
        offset_scale: NonNegativeFloat = 0.1,
        shrinkage: ShrinkageKind = "fixed",
        sparse: bool = False,
    ) -> None:
        super().__init__()
        first = initial_vectors(1, user_dim, init=init, vocabulary=vocabulary)
        self.generic_vector = nn.Parameter(first[0])  # [user_dim]
        if rank is None or rank >= user_dim:
            offsets = initial_vectors(n_users + 1, user_dim, init=init, vocabulary=vocabulary)
            self.basis = None
        else:
            offsets = torch.randn(n_users + 1, rank)
            self.basis = nn.Parameter(
                initial_vectors(rank, user_dim, init=init, vocabulary=vocabulary)
            )
        # padding_idx keeps o_0 at zero: its row gets no gradient.
        self.offsets = nn.Embedding(
            n_users + 1, offsets.shape[1], padding_idx=GENERIC_USER, sparse=sparse
        )
        with torch.no_grad():
            self.offsets.weight.copy_(offset_scale * offsets)
            self.offsets.weight[GENERIC_USER].zero_()
        self.learn_shrinkage(shrinkage, offsets.shape[1], self.generic_vector)

    def numbers(self, users: UserBatch) -> Tensor:
        own: Tensor = self.offsets(users.user_id)  # [B, user_dim] or [B, r]
        return own

    def vectors(self, numbers: Tensor) -> Tensor:
        return self.generic_vector + (numbers if self.basis is None else numbers @ self.basis)

    def generic(self, batch_size: int) -> Tensor:
        return self.generic_vector.expand(batch_size, -1)

    def user_parameters(self) -> Iterable[nn.Parameter]:
        return self.offsets.parameters()
