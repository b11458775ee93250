"""The interface of an aggregator, which calls the backbone and lets the user vector act on the text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from plrhf.backbone.model import Backbone
from plrhf.core.row_packing import UserSlots
from plrhf.core.types import PreferenceBatch


class Aggregator(nn.Module, ABC):
    """Runs the backbone on a batch for given user vectors.

    A subclass is built by keyword. Of `hidden_size`, `block_size`, `embedding_size` and `n_blocks` it is
    handed those that its constructor names, beside its own settings.

    Attributes:
        user_dim: width of the user vectors it needs; the encoder is built to it.
        output_size: width of the hidden states it gives.
        after_trunk: whether the trunk does not depend on the user. A reward model then pools the trunk's
            outputs first and hands them over as `PreferenceBatch.hidden`, one a distinct text.
        unembeddable: whether its hidden states can be unembedded, as a policy must.
        n_positions: how many of the backbone's positions user vectors take.
        needs_causal: whether the backbone must read left to right.
        shares_prompts: whether prompts are read alike for all users, so that one reading serves them all.
        penalty_weight: factor of `penalty` in the training loss.
        user_acts: whether user vectors change the hidden states; else they act in the reward head alone.
    """

    user_dim: int
    output_size: int
    after_trunk: bool = False
    unembeddable: bool = True
    n_positions: int = 0
    needs_causal: bool = False
    shares_prompts: bool = False
    penalty_weight: float = 0.0
    user_acts: bool = True

    @abstractmethod
    def forward(self, backbone: Backbone, batch: PreferenceBatch, user: Tensor) -> Tensor:
        """Compute the hidden states of the text for the users, user vectors excluded.

        Args:
            batch: B pairs in R rows of L tokens.
            user: [C * B, user_dim], C contexts one after the other, or [C * B, 0] for no user model.

        Returns:
            [C, R, L, output_size].
        """

    @abstractmethod
    def decoding(
        self, backbone: Backbone, input_ids: Tensor, attention_mask: Tensor, user: Tensor
    ) -> AbstractContextManager[dict[str, Any]]:
        """Return a context in which the model's `generate`, given what it yields, writes for the users.

        Args:
            input_ids, attention_mask: [N, L] int64, left-padded prompts. user: [N, user_dim].
        """

    def without_user(self, backbone: Backbone, batch: PreferenceBatch) -> PreferenceBatch:
        """Compute all of a batch's text that does not depend on the user, for calls with many users."""
        return batch

    def user_slots(self, n_contexts: int) -> UserSlots:
        """Say where user vectors stand in the rows of a batch that is asked in that many contexts."""
        return UserSlots(self.n_positions)

    def text_parameters(self) -> list[nn.Parameter]:
        """Name the parameters that act on the text alone, which learn and decay like the head."""
        return []

    def reward_terms(
        self, hidden: Tensor, direction: Tensor, user_dim: int
    ) -> tuple[Tensor, Tensor] | None:
        """Write the reward w . h of pooled texts as a + b . e_u, where it is linear in the user's vector.

        A pair then costs two products of user vectors instead of two of hidden states.

        Args:
            hidden: [M, d] pooled trunk outputs. direction: w, [output_size].
            user_dim: width of the user vectors, 0 for no user model.

        Returns:
            a [M] and b [M, user_dim], float32; None where the reward is not linear or that is no gain.
        """
        return None

    def drop_shift(self) -> None:
        """Remove what adds the same to both responses of a pair.

        A reward model whose loss sees differences of rewards alone calls this, since such parameters
        would be learned and saved without any effect.
        """

    def count_pairs(self, n_pairs: int) -> None:
        """Learn before training how many train pairs there are."""

    def penalty(self) -> Tensor | None:
        """Return a scalar that training adds to its loss with `penalty_weight`, or None.

        It is asked for after the forward of the batch it is added to.
        """
        return None


def text_layer(hidden_size: int, width: int | None, dropout: float) -> nn.Module:
    """Build tanh(W dropout(LayerNorm(h))) of a width, for features the trunk does not have linearly.

    Args:
        width: None gives hidden states as they are.
    """
    if width is None:
        return nn.Identity()
    return nn.Sequential(
        nn.LayerNorm(hidden_size, elementwise_affine=False),
        nn.Dropout(dropout),
        nn.Linear(hidden_size, width),
        nn.Tanh(),
    )


def read_without_user(backbone: Backbone, batch: PreferenceBatch, layer: nn.Module) -> Tensor:
    """Compute the text's hidden states [R, L, d], or pooled ones [B, 2, d] where given, behind a layer."""
    if batch.hidden is not None:
        # The layer runs once a distinct text. Of two ways to index, this one's backward is faster.
        assert batch.texts is not None
        return nn.functional.embedding(batch.texts, layer(batch.hidden))
    if batch.trunk is not None:
        return layer(batch.trunk)
    return layer(backbone.read_text(batch))


def spread_over_rows(user: Tensor, batch: PreferenceBatch) -> Tensor:
    """Repeat vectors of pairs for the rows of the pairs, [C * B, D] -> [C, R, D]."""
    n_pairs, n_rows = len(batch), batch.segment.shape[0]
    per_context = user.view(len(user) // n_pairs, 1, n_pairs, user.shape[1])  # [C, 1, B, D]
    return per_context.expand(-1, n_rows // n_pairs, -1, -1).flatten(1, 2)
