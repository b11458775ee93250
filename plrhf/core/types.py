"""The batches that the data module gives to the models: fields, shapes and dtypes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from plrhf.core.row_index import Extent, RowIndex
    from plrhf.core.row_packing import RowPacking, UserSlots

GENERIC_USER = 0
"""Index of the generic user u_0. The users of the training rows have the indices 1, 2, ..."""

PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, -1
"""Values of `PreferenceBatch.segment`: which part of the row a token belongs to."""


KeysAndValues = list[tuple[Tensor, Tensor]]
"""Keys and values of computed positions, one pair of tensors for each block."""


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has no values, as in a plan of a run."""
    return type(tensor) is not Tensor


@dataclass
class Pinnable:
    """What tensors it has, a loader can copy to memory that a GPU reads without stopping the program."""

    def pin_memory(self) -> Self:
        """Return the same with all tensors in pinned memory; `DataLoader` calls it."""
        parts = {name: one for name, one in vars(self).items() if hasattr(one, "pin_memory")}
        return replace(self, **{name: one.pin_memory() for name, one in parts.items()})


@dataclass
class UserContext(Pinnable):
    """Earlier pairs of the users, which some encoders read instead of an id.

    Texts are given as pooled outputs of the untrained trunk, without gradient.
    """

    hidden: Tensor  # [M, d] float32, pooled trunk outputs of the pairs' distinct texts
    texts: Tensor  # [B, k, 2] int64, which of them are chosen and rejected
    present: Tensor  # [B, k] bool, whether there is such a pair; none is the generic user

    @property
    def swapped(self) -> UserContext:
        """The same pairs with chosen and rejected swapped."""
        return replace(self, texts=self.texts.flip(-1))


@dataclass
class UserBatch:
    """The users whose vectors are computed."""

    user_id: Tensor  # [B] int64, 0 is the generic user
    features: Tensor  # [B, F] float32, numbers standardised, categories as codes, NaN is missing
    context: UserContext | None = None  # pairs of the users' own, for `UserEncoder.reads_context`
    row: Tensor | None = None  # [B] int64, of the pairs asked, their places in the split


@dataclass
class Feedback(Pinnable):
    """What rows say of their choices beyond which response was chosen."""

    is_tie: Tensor  # [B] bool, whether neither response was preferred
    weight: Tensor  # [B] float32, of the pair's loss; 1 on average over a split
    strength: Tensor  # [B] float32, how much better the chosen response is
    choice: Tensor | None = None  # [B] int64, pairs of one number are one choice
    rating: Tensor | None = None  # [B] int64, level of a response alone; -1: of a pair

    def __getitem__(self, at: Tensor) -> Feedback:
        """Return the feedback of the pairs at indices [B], with their choices numbered anew."""
        choice = None if self.choice is None else self.choice[at].unique(return_inverse=True)[1]
        rating = None if self.rating is None else self.rating[at]
        return Feedback(self.is_tie[at], self.weight[at], self.strength[at], choice, rating)


@dataclass
class PreferenceBatch(Pinnable):
    """B preference pairs in R rows of L tokens.

    Packed layout (R = B): ``prompt | chosen | rejected | padding``, where positions of the rejected
    response start again at the prompt's end. Two-row layout (R = 2B): ``prompt | chosen`` of all pairs,
    then ``prompt | rejected`` of all pairs. In both layouts, a response's values are summed over all
    rows of its pair.
    """

    user_id: Tensor  # [B] int64
    features: Tensor  # [B, F] float32
    input_ids: Tensor  # [R, L] int64
    segment: Tensor  # [R, L] int64: 0 prompt, 1 chosen, 2 rejected, -1 padding
    position_ids: Tensor  # [R, L] int64, text positions from 0 (user vectors not counted)
    row: Tensor  # [B] int64, place of the pair in its split
    ref_logps: Tensor | None = None  # [B, 2] float32, reference log-probability of chosen, rejected
    hidden: Tensor | None = None  # [M, d] pooled trunk outputs of the batch's distinct texts
    texts: Tensor | None = None  # [B, 2] int64, which of them are chosen and rejected
    text_keys: Tensor | None = None  # [M] int64, hashes of these texts, alike in all splits
    read: Tensor | None = None  # [M, F] what a frozen head reads of them, where it is kept
    trunk: Tensor | None = (
        None  # [R, L, d] last hidden states without any user, where they are kept
    )
    prompts: KeysAndValues | None = None  # of prompts without any user, where they are kept
    feedback: Feedback | None = None  # None: plain choices that all count alike
    weight: Tensor | None = None  # [B] float32, see `PairDataset.shard`; None: a batch of its own
    packing: RowPacking | None = None  # how rows may be packed for the trunk; None: they stay
    index: RowIndex | None = None  # of rows as they are; None: made where it is needed
    context: UserContext | None = None  # other pairs of the users, see `data.own_pairs`
    step_weight: float = 1.0  # of the batch in its optimiser step, see `ResumableBatchSampler`

    @property
    def users(self) -> UserBatch:
        """The users who made the choices, in batch order."""
        return UserBatch(self.user_id, self.features, context=self.context, row=self.row)

    @property
    def extent(self) -> Extent | None:
        """The rows' extent, if the loader has computed it."""
        return None if self.index is None else self.index.extent

    def pooled(
        self, hidden: Tensor, texts: Tensor, text_keys: Tensor | None = None
    ) -> PreferenceBatch:
        """Return the same pairs with pooled trunk outputs [M, d] instead of text.

        Args:
            texts: index of each pair's chosen and rejected text in `hidden`, [B, 2].
            text_keys: hashes of the texts, [M].
        """
        both = torch.arange(CHOSEN, REJECTED + 1, device=hidden.device)
        segment = both.expand(len(self), 2)
        blank = torch.zeros_like(segment)
        return replace(
            self,
            input_ids=blank,
            segment=segment,
            position_ids=blank,
            hidden=hidden,
            texts=texts,
            text_keys=text_keys,
            packing=None,
            index=None,
        )

    def packing_for(self, slots: UserSlots) -> RowPacking | None:
        """Return the packing of rows with these user slots; None if the batch has none for them."""
        made = self.packing
        return made if made is not None and made.slots == slots else None

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of values [B] over the batch's pairs, weighted if the batch is a rank's shard.

        The mean of the result over all processes is the mean over all pairs.
        """
        return values.mean() if self.weight is None else (values * self.weight).sum()

    def counted(self) -> Tensor:
        """Return whether each pair counts, [B] bool; extra pairs that keep processes in step do not."""
        everything = torch.ones_like(self.user_id, dtype=torch.bool)
        return everything if self.weight is None else self.weight > 0

    def __len__(self) -> int:
        return self.user_id.shape[0]
