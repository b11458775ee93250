"""Users as mixtures of a few clusters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from plrhf.core.checks import NonNegativeFloat, check_arguments
from plrhf.core.types import GENERIC_USER, UserBatch
from plrhf.encoders.base import Init, UserEncoder, initial_vectors


@check_arguments("encoder")
class ClusterMixtureEncoder(UserEncoder):
    """Mixes K cluster vectors by weights of the user (arXiv 2402.05133, cluster-based preference).

    e_u = sum_k softmax(w_u)_k V_k.

    Args:
        n_users: users of the training rows, numbered from 1; user 0 has its own learned w_0.
        n_clusters: K.
        init: how the V_k start; see `initial_vectors`.
        weight_scale: standard deviation of the starting w_u.
        sparse: update the rows of a batch's users alone (see `optim.RowAdamW`): for many users.
    """

    def __init__(
        self,
        *,
        n_users: int,
        user_dim: int,
        vocabulary: Tensor,
        n_clusters: Annotated[int, Field(ge=2)] = 10,
        init: Init = "vocabulary",
        weight_scale: NonNegativeFloat = 0.1,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.clusters = nn.Parameter(  # [K, user_dim]
            initial_vectors(n_clusters, user_dim, init=init, vocabulary=vocabulary)
        )
        self.weights = nn.Embedding(n_users + 1, n_clusters, sparse=sparse)
        nn.init.normal_(self.weights.weight, std=weight_scale)

    def mixture(self, user_id: Tensor) -> Tensor:
        """Compute the cluster weights of users, [B] -> [B, K], rows summing to 1."""
        return self.weights(user_id).softmax(dim=-1)

    def forward(self, users: UserBatch) -> Tensor:
        return self.mixture(users.user_id) @ self.clusters

    def generic(self, batch_size: int) -> Tensor:
        own = torch.full((batch_size,), GENERIC_USER, device=self.clusters.device)
        return self.mixture(own) @ self.clusters

    def user_parameters(self) -> Iterable[nn.Parameter]:
        return self.weights.parameters()
