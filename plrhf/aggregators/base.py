"""The interface of an aggregator, which calls the backbone and lets the user vector act on the text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from plrhf.aggregators.text_residual import TextResidual
from plrhf.backbone.model import Backbone
from plrhf.core.row_packing import UserSlots
from plrhf.core.types import PreferenceBatch


class Aggregator(nn.Module, ABC):
    """Runs the backbone on a batch, given user vectors.

    A subclass is built by keyword. Its constructor gets its own settings, and those of `hidden_size`,
    `block_size`, `embedding_size`, `n_blocks` and `n_texts` (train texts that repeat) that it has as
    parameters.

    Attributes:
        user_dim: width of the user vectors; the encoder is built to it.
        output_size: width of the hidden states that it returns.
        after_trunk: whether the trunk does not depend on the user. A reward model then pools the
            trunk's outputs first and passes them as `PreferenceBatch.hidden`, once for each distinct
            text.
        unembeddable: whether its hidden states can be unembedded, as a policy needs.
        n_positions: number of the backbone's positions that user vectors take.
        needs_causal: whether the backbone must be causal.
        shares_prompts: whether prompts do not depend on the user, so that all users can share them.
        penalty_weight: factor of `penalty` in the training loss.
        residual: adds to the pooled outputs of texts that repeat, or None.
        user_acts: whether user vectors change the hidden states; otherwise they act in the head only.
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

    def __init__(self) -> None:
        super().__init__()
        self.residual: TextResidual | None = None

    @abstractmethod
    def forward(self, backbone: Backbone, batch: PreferenceBatch, user: Tensor) -> Tensor:
        """Compute the hidden states of the text for the users, without the positions of user vectors.

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
        """Return a context in which the model's `generate` writes for the users; it yields its inputs.

        Args:
            input_ids, attention_mask: [N, L] int64, left-padded prompts. user: [N, user_dim].
        """

    def continuing(self, backbone: Backbone, user: Tensor) -> AbstractContextManager[Any] | None:
        """Return a context in which the trunk computes further tokens of texts begun in `decoding`.

        Texts can then be written in a batch that others join and leave. A subclass that changes `decoding`
        changes this, too, or its texts are written in batches from beginning to end.

        Args:
            user: [N, user_dim], or [N, 0] for no user model.

        Returns:
            None if texts can only be written from beginning to end.
        """
        return None

    def without_user(self, backbone: Backbone, batch: PreferenceBatch) -> PreferenceBatch:
        """Add all that does not depend on the user to a batch, for calls with many user vectors."""
        return batch

    def user_slots(self, n_contexts: int) -> UserSlots:
        """Return where user vectors are in the rows of a batch computed in `n_contexts` contexts."""
        return UserSlots(self.n_positions)

    def text_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that act on text alone, which are optimised like the head's."""
        return []

    def with_residuals(self, batch: PreferenceBatch) -> PreferenceBatch:
        """Add the residuals of texts to the pooled outputs of a batch, if there are any."""
        if self.residual is None or batch.hidden is None or batch.text_keys is None:
            return batch
        return replace(batch, hidden=self.residual(batch.hidden, batch.text_keys), text_keys=None)

    def transform_texts(self, hidden: Tensor) -> Tensor | None:
        """Transform the pooled trunk outputs of texts, [M, d] -> [M, output_size], if no user acts on them.

        What follows can then run once for each distinct text.

        Returns:
            None if users act on them.
        """
        return None

    def reward_terms(
        self, hidden: Tensor, direction: Tensor, user_dim: int
    ) -> tuple[Tensor, Tensor] | None:
        """Write the reward w . h of pooled texts as a + b . e_u, if it is linear in the user's vector.

        A pair then costs two products of the width of user vectors instead of hidden states.

        Args:
            hidden: [M, d] pooled trunk outputs. direction: w, [output_size].
            user_dim: width of the user vectors, 0 for no user model.

        Returns:
            a [M] and b [M, user_dim], float32; None if the reward is not linear or nothing is saved.
        """
        return None

    def drop_shift(self) -> None:
        """Remove parameters that add the same value to both responses of a pair.

        A reward model whose loss depends on reward differences only calls this. It could not learn
        them.
        """

    def count_pairs(self, n_pairs: int) -> None:
        """Set the number of train pairs before training, for learned shrinkage."""

    def penalty(self) -> Tensor | None:
        """Return a scalar that training adds to its loss with `penalty_weight`, or None.

        It is called after the forward pass of the batch.
        """
        return None


class TextLayer(nn.Sequential):
    """Computes tanh(W dropout(LayerNorm(h))), which gives features that are not linear in the trunk's.

    Where the prompt's hidden state stands behind the response's, [..., 2 d], each of the two goes
    through the same layer.

    Args:
        hidden_size: d. width: of W's output.
    """

    def __init__(self, hidden_size: int, width: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(hidden_size, elementwise_affine=False),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, width),
            nn.Tanh(),
        )
        self.hidden_size = hidden_size

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.shape[-1] == self.hidden_size:
            return super().forward(hidden)
        each: Tensor = super().forward(hidden.unflatten(-1, (-1, self.hidden_size)))
        return each.flatten(-2)


def text_layer(hidden_size: int, width: int | None, dropout: float) -> nn.Module:
    """Build a `TextLayer`; with `width` None there is no layer, and hidden states stay as they are."""
    return nn.Identity() if width is None else TextLayer(hidden_size, width, dropout)


def read_without_user(backbone: Backbone, batch: PreferenceBatch, layer: nn.Module) -> Tensor:
    """Compute hidden states [R, L, d] of a batch, or [B, 2, d] if it has pooled ones, after a layer."""
    if batch.hidden is not None:
        # The layer runs once a distinct text. Of two ways to index, this one's backward is faster.
        assert batch.texts is not None
        return nn.functional.embedding(batch.texts, layer(batch.hidden))
    if batch.trunk is not None:
        return layer(batch.trunk)
    return layer(backbone.read_text(batch))


def spread_over_rows(user: Tensor, batch: PreferenceBatch) -> Tensor:
    """Repeat the vectors of pairs for each row of the pairs, [C * B, D] -> [C, R, D]."""
    n_pairs, n_rows = len(batch), batch.segment.shape[0]
    per_context = user.view(len(user) // n_pairs, 1, n_pairs, user.shape[1])  # [C, 1, B, D]
    return per_context.expand(-1, n_rows // n_pairs, -1, -1).flatten(1, 2)
