"""What encoders share that read a user's pairs and not an id."""

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
    """Computes a user's vector from pairs they chose in, so that nobody new needs any fitting.

    A user without pairs is the generic one and has a learned vector. The vectors of train users are
    stored when training ends: without `UserBatch.context` users are looked up among them.

    Args:
        n_users: users of the training rows, numbered from 1.
        min_pairs, max_pairs: see `UserEncoder`.
        init: how the generic user's vector starts; see `initial_vectors`.

    Attributes:
        vectors: of the users, row u of user u, [n_users + 1, user_dim]; zero where none is stored.
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
        """Compute vectors [B, user_dim] and penalties [B], or None, from pairs of the users.

        What it says of a user without any pair is not used, but must be finite.
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
        """Keep the vectors of users by their ids, for when their pairs are not at hand."""
        self.vectors[users.user_id] = self(users).to(self.vectors)

    def _stored(self, user_id: Tensor) -> Tensor:
        found, generic = self.vectors[user_id], user_id == GENERIC_USER
        if not bool((found.any(dim=1) | generic).all()):
            raise bad_value(
                "context",
                None,
                "pairs of the users, as no vectors of theirs are stored yet",
                "Load the run's export, or a checkpoint of a run that has ended",
            )
        return torch.where(generic[:, None], self.generic_vector, found)
