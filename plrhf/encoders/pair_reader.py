"""The base of encoders that read a user's pairs instead of an id."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from plrhf.core.checks import PositiveInt
from plrhf.core.errors import bad_value
from plrhf.core.types import GENERIC_USER, UserBatch, UserContext
from plrhf.encoders.base import Init, UserEncoder, initial_vectors


class PairReader(UserEncoder):
    """Computes a user's vector from the user's pairs, so that new users need no fitting.

    A user without pairs gets the generic user's vector, which is learned. After training, the vectors
    of train users are stored. They are looked up when `UserBatch.context` is missing.

    Args:
        n_users: number of train users, with indices from 1.
        min_pairs, max_pairs: see `UserEncoder`.
        init: initial vector of the generic user; see `initial_vectors`.

    Attributes:
        vectors: stored vectors by user index, [n_users + 1, user_dim]; zero if not stored.
    """

    reads_context = True

    def __init__(
        self,
        *,
        n_users: int,
        user_dim: int,
        vocabulary: Tensor,
        min_pairs: PositiveInt = 1,
        max_pairs: PositiveInt = 16,
        init: Init = "normal",
    ) -> None:
        super().__init__()
        self.min_pairs, self.max_pairs = min_pairs, max_pairs
        first = initial_vectors(1, user_dim, init=init, vocabulary=vocabulary)
        self.generic_vector = nn.Parameter(first[0])  # [user_dim]
        self.vectors: Tensor
        self.register_buffer("vectors", torch.zeros(n_users + 1, user_dim))

    @abstractmethod
    def read(self, context: UserContext) -> tuple[Tensor, Tensor | None]:
        """Compute vectors [B, user_dim], and penalties [B] or None, from the users' pairs.

        The result for a user without pairs is not used, but must be finite.
        """

    def encode(self, users: UserBatch) -> tuple[Tensor, Tensor | None]:
        if users.context is None:
            return self._stored(users.user_id), None
        vectors, penalty = self.read(users.context)
        known = users.context.present.any(dim=1)  # [B]
        return (
            torch.where(known[:, None], vectors, self.generic_vector),
            None if penalty is None else penalty * known,
        )

    def forward(self, users: UserBatch) -> Tensor:
        return self.encode(users)[0]

    def generic(self, batch_size: int) -> Tensor:
        return self.generic_vector.expand(batch_size, -1)

    def user_parameters(self) -> Iterable[nn.Parameter]:
        return ()

    @torch.no_grad()
    def store(self, users: UserBatch) -> None:
        """Store the vectors of users by their ids."""
        self.vectors[users.user_id] = self(users).to(self.vectors)

    def _stored(self, user_id: Tensor) -> Tensor:
        """Return the stored vectors of users; raise a ValueError if none are stored."""
        found, generic = self.vectors[user_id], user_id == GENERIC_USER
        if not bool((found.any(dim=1) | generic).all()):
            raise bad_value(
                "context",
                None,
                "pairs of the users, as no vectors of theirs are stored yet",
                "Load the run's export, or a checkpoint of a run that has ended",
            )
        return torch.where(generic[:, None], self.generic_vector, found)
