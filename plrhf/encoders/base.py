"""What a user encoder is: users in, one vector each out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from plrhf.core.errors import bad_value
from plrhf.core.types import UserBatch

Init = Literal["vocabulary", "uniform", "normal"]


class UserEncoder(nn.Module, ABC):
    """f_P: who is this user -> e_u of width `user_dim`.

    A subclass is built by keyword; of `n_users`, `user_dim`, `n_numbers`, `category_sizes` and
    `vocabulary` it is handed those its constructor names, beside its own settings.

    Attributes:
        personal: whether e_u depends on u. Where it does not, the user-specific and the generic
            context are the same and are computed once.
    """

    personal: bool = True

    @abstractmethod
    def forward(self, users: UserBatch) -> Tensor:
        """Vectors of the users, [B] -> [B, user_dim] float32."""

    @abstractmethod
    def generic(self, batch_size: int) -> Tensor:
        """The generic user's vector, [batch_size, user_dim] float32."""

    @abstractmethod
    def user_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters whose rows belong to single users, all other parameters being shared."""


def initial_vectors(n: int, user_dim: int, *, init: Init, vocabulary: Tensor) -> Tensor:
    """First values of n user vectors, [n, user_dim] float32.

    ``vocabulary`` lays embeddings of random tokens, drawn with replacement, end to end
    (arXiv 2402.05133, appendix); ``uniform`` draws from (-.5, .5); ``normal`` from N(0, 1).

    Args:
        vocabulary: [V, d] input embeddings; user_dim must be a multiple of d for ``vocabulary``.

    Raises:
        ValueError: unknown init, or vectors that token embeddings do not fit.
    """
    if init == "uniform":
        return torch.rand(n, user_dim) - 0.5
    if init == "normal":
        return torch.randn(n, user_dim)
    if init != "vocabulary":
        raise bad_value(
            "encoder.init", init, "vocabulary, uniform or normal", "Set encoder.init=uniform"
        )
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


def check_at_least(field: str, value: int | float, least: int | float) -> None:
    """Raise unless a numeric setting is at least `least`."""
    if value < least:
        raise bad_value(field, value, f"a number from {least}", f"Set {field}={least}")
