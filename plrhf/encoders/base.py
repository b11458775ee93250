"""The interface of a user encoder, which computes one vector for each user."""

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

    A subclass is built by keyword. Its constructor gets its own settings, and those of `n_users`,
    `user_dim`, `hidden_size`, `n_numbers`, `category_sizes` and `vocabulary` that it has as parameters.

    Attributes:
        personal: whether e_u depends on u. If not, the user's and the generic context are the same and
            are computed once.
        penalty_weight: factor of the penalty of `encode` in the training loss.
        reads_context: whether it reads pairs of the users (`UserBatch.context`) instead of their ids.
        min_pairs, max_pairs: range of the number of a user's pairs that are drawn for each train pair.
    """

    personal: bool = True
    penalty_weight: float = 0.0
    reads_context: bool = False
    min_pairs: int = 1
    max_pairs: int = 16

    @property
    def same_for_user(self) -> bool:
        """Whether a user's vector is surely the same in all pairs of a batch, so that they can share it."""
        return False

    @abstractmethod
    def forward(self, users: UserBatch) -> Tensor:
        """Compute the vectors of the users, [B] -> [B, user_dim] float32."""

    @abstractmethod
    def generic(self, batch_size: int) -> Tensor:
        """Return the vector of the generic user, repeated, [batch_size, user_dim] float32."""

    @abstractmethod
    def user_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters whose row u belongs to user u, row 0 to the generic user."""

    def encode(self, users: UserBatch) -> tuple[Tensor, Tensor | None]:
        """Compute the vectors of the users, and a penalty for the training loss.

        Returns:
            [B, user_dim], and a penalty [B] (a KL term, an entropy) or None. It is added to the
            training loss with `penalty_weight`, and never to val/loss.
        """
        return self(users), None

    def count_pairs(self, pairs_per_user: Tensor) -> None:
        """Set the number of independent train pairs of each user before training, [n_users + 1] int64."""

    @property
    def device(self) -> torch.device:
        """Device of the encoder's weights, for tensors created in `forward` and `generic`."""
        return next((one.device for one in self.parameters()), torch.device("cpu"))


class ShrunkEncoder(UserEncoder):
    """An encoder that computes e_u from a few numbers of the user, and can learn to shrink them.

    With `shrinkage` "learned", training samples the numbers from their posterior, and `encode` returns
    their divergence from the prior; see `core.shrinkage`. The generic user is then the zero vector, and
    the rest of the model learns what all users share: a learned vector of all users would be a second
    path to it, without a prior. With "fixed", only `optim.user_weight_decay` pulls users towards the
    generic user.
    """

    penalty_weight = 1.0
    pairs_per_user: Tensor | None  # [n_users + 1] float32; None: not counted yet, one each

    def __init__(self) -> None:
        super().__init__()
        self.shrinkage: Shrinkage | None = None
        self.register_buffer("pairs_per_user", None, persistent=False)

    @property
    def same_for_user(self) -> bool:
        return self.shrinkage is None  # else it is drawn anew for each pair

    def learn_shrinkage(
        self, kind: ShrinkageKind, n_numbers: int, generic_vector: nn.Parameter | None = None
    ) -> None:
        """Add a learned prior of `n_numbers` numbers a user if `kind` is "learned".

        Args:
            generic_vector: e_0 that is added to all vectors, which then stays zero.
        """
        if kind == "learned":
            self.shrinkage = Shrinkage(n_numbers)
            if generic_vector is not None:
                nn.init.zeros_(generic_vector).requires_grad_(False)

    @abstractmethod
    def numbers(self, users: UserBatch) -> Tensor:
        """Return the users' numbers, [B, r], which are shrunk."""

    @abstractmethod
    def vectors(self, numbers: Tensor) -> Tensor:
        """Compute user vectors from the users' numbers, [B, r] -> [B, user_dim]."""

    def prior_mean(self) -> Tensor | float:
        """Return the generic user's numbers, towards which others are shrunk, [r] or 0."""
        return 0.0

    def count_pairs(self, pairs_per_user: Tensor) -> None:
        self.pairs_per_user = pairs_per_user.to(self.device, torch.float32).clamp(min=1.0)

    def forward(self, users: UserBatch) -> Tensor:
        return self.vectors(self._drawn(self.numbers(users), users))

    def encode(self, users: UserBatch) -> tuple[Tensor, Tensor | None]:
        if not self.training or self.shrinkage is None:
            return self(users), None
        numbers = self.numbers(users)
        penalty = self.shrinkage(numbers - self.prior_mean(), self._n_pairs(users))
        return self.vectors(self._drawn(numbers, users)), penalty

    def _drawn(self, numbers: Tensor, users: UserBatch) -> Tensor:
        """Draw numbers [B, r] from their posterior in training with learned shrinkage."""
        if not self.training or self.shrinkage is None:
            return numbers
        return self.shrinkage.sample(numbers, self._n_pairs(users), users.row)

    def _n_pairs(self, users: UserBatch) -> Tensor:
        """Return the number of train pairs of each user."""
        if self.pairs_per_user is None:
            return torch.ones(len(users.user_id), 1, device=users.user_id.device)
        return self.pairs_per_user[users.user_id][:, None]  # [B, 1]


def initial_vectors(n: int, user_dim: int, *, init: Init, vocabulary: Tensor) -> Tensor:
    """Draw initial user vectors, [n, user_dim] float32.

    Args:
        init: ``vocabulary`` concatenates embeddings of random tokens, drawn with replacement (arXiv
            2402.05133, appendix); ``uniform`` draws from (-.5, .5); ``normal`` from N(0, 1).
        vocabulary: [V, d] input embeddings; ``vocabulary`` needs a user_dim that is a multiple of d.

    Raises:
        ValueError: the width is not a multiple of the token embeddings'.
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
