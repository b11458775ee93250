"""One learned vector for all users: a control with the capacity of a soft prompt and no user."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from plrhf.core.checks import check_arguments
from plrhf.core.types import UserBatch
from plrhf.encoders.base import Init, UserEncoder, initial_vectors


@check_arguments("encoder")
class UniformEncoder(UserEncoder):
    """Gives every user the same learned vector, e_u = e_0 (arXiv 2402.05133, uniform preference)."""

    personal = False
    same_for_user = True

    def __init__(self, *, user_dim: int, vocabulary: Tensor, init: Init = "vocabulary") -> None:
        super().__init__()
        first = initial_vectors(1, user_dim, init=init, vocabulary=vocabulary)
        self.generic_vector = nn.Parameter(first[0])  # [user_dim]

    def forward(self, users: UserBatch) -> Tensor:
        return self.generic(len(users.user_id))

    def generic(self, batch_size: int) -> Tensor:
        return self.generic_vector.expand(batch_size, -1)

    def user_parameters(self) -> Iterable[nn.Parameter]:
        return ()
