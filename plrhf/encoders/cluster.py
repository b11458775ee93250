"""Users as mixtures of clusters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from plrhf.core.checks import NonNegativeFloat, check_arguments
from plrhf.core.shrinkage import ShrinkageKind
from plrhf.core.types import GENERIC_USER, UserBatch
from plrhf.encoders.base import Init, ShrunkEncoder, initial_vectors


@check_arguments("encoder")
class ClusterMixtureEncoder(ShrunkEncoder):
    """Mixes K cluster vectors by weights of the user (arXiv 2402.05133, cluster-based preference).

    e_u = sum_k softmax(w_u)_k V_k.

    Args:
        n_users: number of train users, with indices from 1; user 0 has its own learned w_0.
        n_clusters: K.
        init: initial V_k; see `initial_vectors`. ``identity``: V_k is the k-th unit vector, so that e_u
            starts as the mixture weights themselves (for a `BasisHead` with raw weights).
        frozen: do not train the V_k.
        weight_scale: standard deviation of the initial w_u.
        shrinkage: of w_u - w_0, see `ShrunkEncoder`.
        sparse: update only the rows of a batch's users (see `optim.RowAdamW`), for many users.
    """

    def __init__(
        self,
        *,
        n_users: int,
        user_dim: int,
        vocabulary: Tensor,
        n_clusters: Annotated[int, Field(ge=2)] = 10,
        init: Init | Literal["identity"] = "vocabulary",
        frozen: bool = False,
        weight_scale: NonNegativeFloat = 0.1,
        shrinkage: ShrinkageKind = "fixed",
        sparse: bool = False,
    ) -> None:
        super().__init__()
        if init == "identity":
            vectors = torch.eye(n_clusters, user_dim)
        else:
            vectors = initial_vectors(n_clusters, user_dim, init=init, vocabulary=vocabulary)
        self.clusters = nn.Parameter(vectors, requires_grad=not frozen)  # [K, user_dim]
        self.weights = nn.Embedding(n_users + 1, n_clusters, sparse=sparse)
        nn.init.normal_(self.weights.weight, std=weight_scale)
        self.learn_shrinkage(shrinkage, n_clusters)

    def mixture(self, user_id: Tensor) -> Tensor:
        """Compute the cluster weights of users, [B] -> [B, K], rows summing to 1."""
        return self.weights(user_id).softmax(dim=-1)

    def numbers(self, users: UserBatch) -> Tensor:
        logits: Tensor = self.weights(users.user_id)
        return logits

    def vectors(self, numbers: Tensor) -> Tensor:
        return self._vectors_of(numbers.softmax(dim=-1))

    def _vectors_of(self, mixture: Tensor) -> Tensor:
        """Mix the cluster vectors; with learned shrinkage relative to the generic user's mixture."""
        if self.shrinkage is not None:
            mixture = mixture - self.prior_mean().softmax(dim=-1)
        return mixture @ self.clusters

    def prior_mean(self) -> Tensor:
        own = torch.full((1,), GENERIC_USER, device=self.clusters.device)
        logits: Tensor = self.weights(own)[0]
        return logits

    def generic(self, batch_size: int) -> Tensor:
        own = torch.full((batch_size,), GENERIC_USER, device=self.clusters.device)
        return self._vectors_of(self.mixture(own))

    def user_parameters(self) -> Iterable[nn.Parameter]:
        return self.weights.parameters()
