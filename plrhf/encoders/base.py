"""The interface of a user encoder: users in, one vector each out; and what encoders share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from plrhf.core.errors import bad_value
from plrhf.core.shrinkage import Shrinkage, ShrinkageKind
from plrhf.core.types import UserBatch

Init = Literal["vocabulary", "uniform", "normal"]


class UserEncoder(nn.Module, ABC):
    """Maps a user to a vector e_u of width `user_dim` (f_P of arXiv 2402.05133).

    A subclass is built by keyword. Of `n_users`, `user_dim`, `hidden_size`, `n_numbers`,
    `category_sizes` and `vocabulary` it is handed those that its constructor names, beside its own
    settings.

    Attributes:
        personal: whether e_u depends on u. Where it does not, the user's and the generic context are
            the same and are computed once.
        penalty_weight: factor of the penalty of `encode` in the training loss.
        reads_context: whether it reads pairs of the users, `UserBatch.context`, and not their ids.
        min_pairs, max_pairs: how many of a user's pairs are drawn for it beside a train pair.
    """

    personal: bool = True
    penalty_weight: float = 0.0
    reads_context: bool = False
    min_pairs: int = 1
    max_pairs: int = 16

    @abstractmethod
    def forward(self, users: UserBatch) -> Tensor:
        """Compute the vectors of the users, [B] -> [B, user_dim] float32."""

    @abstractmethod
    def generic(self, batch_size: int) -> Tensor:
        """Repeat the vector of the generic user, [batch_size, user_dim] float32."""

    @abstractmethod
    def user_parameters(self) -> Iterable[nn.Parameter]:
        """Name the parameters whose row u belongs to user u, row 0 to the generic user."""

    def encode(self, users: UserBatch) -> tuple[Tensor, Tensor | None]:
        """Compute the vectors of the users, and what training is to add to their loss.

        Returns:
            [B, user_dim], and a penalty [B] (a KL term, an entropy) or None. It is added to the training
            loss with `penalty_weight`, and never to val/loss.
        """
        return self(users), None

    def count_pairs(self, pairs_per_user: Tensor) -> None:
        """Learn before training how many train pairs each user has, [n_users + 1] int64."""

    @property
    def device(self) -> torch.device:
        """Where the encoder's weights are, for tensors made in `forward` and `generic`."""
        return next((one.device for one in self.parameters()), torch.device("cpu"))


class ShrunkEncoder(UserEncoder):
    """An encoder that computes e_u from a few numbers of the user and can learn to shrink them.

    With `shrinkage` of "learned" the numbers are drawn from their posterior in training, and
    `encode` returns their divergence from the prior; see `core.shrinkage`. With "fixed" they are pulled
    towards the generic user by `optim.user_weight_decay` alone.
    """

    penalty_weight = 1.0
    pairs_per_user: Tensor | None  # [n_users + 1] float32; None: not counted yet, one each

    def __init__(self) -> None:
        super().__init__()
        self.shrinkage: Shrinkage | None = None
        self.register_buffer("pairs_per_user", None, persistent=False)

    def learn_shrinkage(self, kind: ShrinkageKind, n_numbers: int) -> None:
        """Add the prior of `n_numbers` numbers a user where `kind` is "learned"."""
        if kind == "learned":
            self.shrinkage = Shrinkage(n_numbers)

    @abstractmethod
    def numbers(self, users: UserBatch) -> Tensor:
        """Return the numbers of the users that are shrunk, [B, r]."""

    @abstractmethod
    def vectors(self, numbers: Tensor) -> Tensor:
        """Compute the vectors of users from their numbers, [B, r] -> [B, user_dim]."""

    def prior_mean(self) -> Tensor | float:
        """Return the numbers of the generic user, which others are pulled towards, [r] or 0."""
        return 0.0

    def count_pairs(self, pairs_per_user: Tensor) -> None:
        self.pairs_per_user = pairs_per_user.to(self.device, torch.float32).clamp(min=1.0)

    def forward(self, users: UserBatch) -> Tensor:
        numbers = self.numbers(users)
        if self.training and self.shrinkage is not None:
            numbers = self.shrinkage.sample(numbers, self._n_pairs(users), users.row)
        return self.vectors(numbers)

    def encode(self, users: UserBatch) -> tuple[Tensor, Tensor | None]:
        vectors = self(users)
        if not self.training or self.shrinkage is None:
            return vectors, None
        return vectors, self.shrinkage(
            self.numbers(users) - self.prior_mean(), self._n_pairs(users)
        )

    def _n_pairs(self, users: UserBatch) -> Tensor:
        if self.pairs_per_user is None:
            return torch.ones(len(users.user_id), 1, device=users.user_id.device)
        return self.pairs_per_user[users.user_id][:, None]  # [B, 1]


def initial_vectors(n: int, user_dim: int, *, init: Init, vocabulary: Tensor) -> Tensor:
    """Draw the first values of n user vectors, [n, user_dim] float32.

    Args:
        init: ``vocabulary`` puts embeddings of random tokens, drawn with replacement, end to end
            (arXiv 2402.05133, appendix); ``uniform`` draws from (-.5, .5); ``normal`` from N(0, 1).
        vocabulary: [V, d] input embeddings; ``vocabulary`` needs a user_dim that is a multiple of d.

    Raises:
        ValueError: vectors that token embeddings do not fit.
    """
    if init == "uniform":
        return torch.rand(n, user_dim) - 0.5
    if init == "normal":
        return torch.randn(n, user_dim)
    n_tokens, width = vocabulary.shape
    if user_dim % width != 0:
        raise bad_value(
            "encoder.init",
            init,
            f"uniform or normal, as user vectors of {user_dim} are no whole number "
            f"of embeddings of {width}",
            "Set encoder.init=normal",
        )
    tokens = torch.randint(n_tokens, (n * user_dim // width,))
    return vocabulary[tokens.to(vocabulary.device)].float().cpu().reshape(n, user_dim)
