"""The interface of a reward head, and what several heads use."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from plrhf.core.types import PreferenceBatch, is_fake


class RewardHead(nn.Module, ABC):
    """Computes the rewards of the two responses of each pair.

    A subclass is built by keyword. Its constructor gets its own settings, and the aggregator's
    `hidden_size` and `user_dim` if it has these parameters.

    Attributes:
        reads_user: whether user vectors change the head's rewards.
        reads_prompt: whether `read` gets the prompt's hidden state too.
        shift_cancels: whether a vector added to both hidden states of a pair changes no margin.
    """

    reads_user: bool = False
    reads_prompt: bool = False
    shift_cancels: bool = False

    def read(self, pooled: Tensor) -> Tensor:
        """Compute the features of each text that do not depend on the user, [..., hidden_size] -> [..., F].

        If no user acts before the head, this runs once for each distinct text and not for each pair.

        Args:
            pooled: hidden states in the dtype of the head's weights; with `reads_prompt`, those of the
                prompt are appended, [..., 2 hidden_size].
        """
        return pooled

    @abstractmethod
    def forward(self, features: Tensor, user: Tensor, batch: PreferenceBatch) -> Tensor:
        """Compute rewards [C, B, 2] float32 of chosen and rejected responses.

        Args:
            features: [C, B, 2, F], from `read`, of both responses.
            user: [C * B, user_dim], C contexts one after the other, in the same dtype.
            batch: the B pairs.
        """

    def compare(
        self, features: Tensor, user: Tensor, batch: PreferenceBatch
    ) -> tuple[Tensor, Tensor]:
        """Compute margins [C, B] and rewards [C, B, 2].

        sigma(margin) is the probability that the user prefers the chosen response. By default the
        margin is the difference of rewards. A head with another probability p overrides this with log(p
        / (1 - p)).
        """
        rewards = self(features, user, batch)
        return rewards[..., 0] - rewards[..., 1], rewards

    @property
    def direction(self) -> Tensor | None:
        """The vector w, [hidden_size], if the reward is w . h for all users; else None."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the head's weights."""
        return next((one.dtype for one in self.parameters()), torch.float32)


def broadcast_user(user: Tensor, features: Tensor) -> Tensor:
    """Reshape user vectors so that they broadcast over both responses, [C * B, D] -> [C, B, 1, D]."""
    return user.view(*features.shape[:2], 1, -1)


def distinct_rows(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the distinct rows of values [..., d], [P, d], and the place of each row among them, [...].

    Values that are learned, or must not be looked at (on a GPU, in a plan, of stacked models), are returned
    as they are, with None.
    """
    if values.is_cuda or is_fake(values) or values.requires_grad:
        return values, None
    try:
        found, place = values.flatten(0, -2).unique(dim=0, return_inverse=True)
    except RuntimeError:  # `vmap`, of values that differ between models
        return values, None
    return found, place.view(values.shape[:-1])


def projector(hidden_size: int, out: int, width: int | None, layers: int = 1) -> nn.Module:
    """Build a linear map from hidden states; with `width`, GELU layers of that width come first."""
    if width is None:
        return nn.Linear(hidden_size, out)
    parts: list[nn.Module] = []
    for n in range(layers):
        parts += [nn.Linear(hidden_size if n == 0 else width, width), nn.GELU()]
    return nn.Sequential(*parts, nn.Linear(width, out))
