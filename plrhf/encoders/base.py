"""The interface of a user encoder: users in, one vector each out."""

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

    @property
    def device(self) -> torch.device:
        """Where the encoder's weights are, for tensors made in `forward` and `generic`."""
        return next((one.device for one in self.parameters()), torch.device("cpu"))


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
