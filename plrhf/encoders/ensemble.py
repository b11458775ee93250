"""Users as weights over the members of an ensemble, each of which learns from half of the users."""

from __future__ import annotations

import torch
from torch import Tensor

from plrhf.core.checks import check_arguments
from plrhf.core.types import UserBatch
from plrhf.encoders.cluster import ClusterMixtureEncoder


@check_arguments("encoder")
class EnsembleEncoder(ClusterMixtureEncoder):
    """Weighs K = `user_dim` members by how well each explains the user's pairs (HyRe, arXiv 2412.08812).

    In training e_u says which members learn from user u: 1 / n for n = K // 2 members drawn at random, 0
    for the others. A head that weighs the losses of its directions by e_u (`BasisHead` with raw weights,
    mixing losses) then trains each direction on its own users. Otherwise e_u = softmax(w_u), where w_uk is
    the log-likelihood of u's train pairs under member k; see `models.train_users`.

    Attributes:
        halves: the weights in training, [n_users + 1, K]; the same for the same seed.
    """

    halves: Tensor

    def __init__(self, *, n_users: int, user_dim: int, vocabulary: Tensor) -> None:
        super().__init__(
            n_users=n_users,
            user_dim=user_dim,
            vocabulary=vocabulary,
            n_clusters=user_dim,
            init="identity",
            frozen=True,
            weight_scale=0.0,
        )
        self.weights.requires_grad_(False)
        n_own = user_dim // 2
        rank = torch.rand(n_users + 1, user_dim).argsort(dim=1).argsort(dim=1)
        self.register_buffer("halves", (rank < n_own) / n_own, persistent=False)

    def forward(self, users: UserBatch) -> Tensor:
        return self.halves[users.user_id] if self.training else super().forward(users)
