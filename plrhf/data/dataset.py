"""The tokenised pairs of one split as a dataset, and each rank's shard of its batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plrhf.core.prefix_sharing import share_prefixes
from plrhf.core.row_index import RowIndex
from plrhf.core.row_packing import NO_USER, RowPacking, UserSlots
from plrhf.core.types import GENERIC_USER, Feedback, PreferenceBatch
from plrhf.data.features import FeatureSchema
from plrhf.data.groups import groups_of
from plrhf.data.packing import Layout, TokenPair, packed
from plrhf.data.rows import Person, Row, Rows
from plrhf.data.store import Indices
from plrhf.data.tokens import TokenFile

if TYPE_CHECKING:
    from plrhf.data.own_pairs import ContextDraw


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class RankShard:
    """Which part of each batch this process takes, and how processes exchange values.

    Args:
        rank, world_size: number of this process, and of all processes.
        sum_over_ranks: sums a CPU tensor over all processes.
        from_rank_zero: sends a small picklable value of rank 0 to all processes.
        accumulated_batches: batches whose gradients are summed for one optimiser step.
    """

    rank: int = 0
    world_size: int = 1
    sum_over_ranks: Callable[[Tensor], Tensor] = _unchanged
    from_rank_zero: Callable[[Any], Any] = _unchanged
    accumulated_batches: int = 1


SINGLE_PROCESS = RankShard()


@dataclass
class TextValues:
    """A value for each distinct text, and the two texts of each pair."""

    values: Tensor  # [M, ...] float32
    of_pair: Tensor  # [N, 2] int64: index of the chosen and of the rejected text
    keys: Tensor | None = None  # [M] int64, hashes of the texts; None: not known

    def __getitem__(self, pairs: Tensor) -> Tensor:
        """Return the values [B, 2, ...] of the pairs at indices [B]."""
        return self.values[self.of_pair[pairs]]


class PairDataset:
    """The tokenised pairs of one split, with values that were precomputed for them.

    Args:
        user_slots: where the model will put user vectors, for `RowPacking`.

    Attributes:
        user_id: index of each pair's user, [N] int64. features: of each pair's user, [N, F] float32.
        ref_logps: reference log-probabilities of chosen and rejected, [N, 2], or None.
        hidden: pooled trunk outputs of chosen and rejected, [N, 2, d], or None.
        groups: which pairs are in one batch; None: none are. Turns of a conversation are only if their
            hidden states are to be computed.
        feedback: weights, strengths and ties, [N]; None: plain choices that all count alike.
        context_hidden: pooled outputs of the untrained trunk, or None.
        context: draws other pairs of each pair's user; None: the encoder reads none.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        pairs: Sequence[TokenPair],
        *,
        layout: Layout,
        user_index: dict[str, int],
        schema: FeatureSchema,
        user_slots: UserSlots = NO_USER,
    ) -> None:
        self.rows, self.pairs, self.layout = rows, pairs, layout
        self.user_slots = user_slots
        people: Sequence[Row | Person] = rows
        person = np.arange(len(rows))
        if isinstance(rows, Rows):
            numbers, person = np.unique(rows.person, return_inverse=True)
            people = [rows.people[number] for number in numbers]
        self._user_ids, self._person = [one.user_id for one in people], torch.from_numpy(person)
        self.number_users(user_index)
        self.features = schema.table([one.user_features for one in people])[self._person]
        self.feedback, self.groups = feedback_of(rows), groups_of(rows)
        self.ref_logps: TextValues | None = None
        self.hidden: TextValues | None = None
        self.context_hidden: TextValues | None = None
        self.context: ContextDraw | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def number_users(self, user_index: dict[str, int]) -> None:
        """Set the user index of each pair; users that are not in `user_index` become the generic user."""
        index = [user_index.get(user, GENERIC_USER) for user in self._user_ids]
        self.user_id = torch.tensor(index, dtype=torch.int64)[self._person]

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Numbers of tokens of prompt, chosen and rejected response of each pair, [N, 3]."""
        if isinstance(self.pairs, TokenFile):
            return self.pairs.lengths
        of_pairs = [(len(one.prompt), len(one.chosen), len(one.rejected)) for one in self.pairs]
        return np.array(of_pairs, dtype=np.int32).reshape(-1, 3)

    def row_lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each pair's row, [N, 1], or of its two rows, [N, 2]."""
        prompt, chosen, rejected = self.lengths.T.astype(np.int64)
        if self.layout is packed:
            return (prompt + chosen + rejected)[:, None]
        return np.stack([prompt + chosen, prompt + rejected], axis=1)

    def batch(self, indices: Sequence[int], *, epoch: int = 0) -> PreferenceBatch:
        """Return the pairs at these indices as one batch; `epoch` decides what is drawn with them."""
        at = torch.tensor(indices, dtype=torch.int64)
        pairs = [] if self.hidden is not None else [self.pairs[index] for index in indices]
        input_ids, segment, positions = self.layout(pairs)
        packing = None if self.hidden is not None else self._packing(input_ids, segment, at)
        batch = PreferenceBatch(
            user_id=self.user_id[at],
            features=self.features[at],
            input_ids=input_ids,
            segment=segment,
            position_ids=positions,
            row=at,
            ref_logps=None if self.ref_logps is None else self.ref_logps[at],
            feedback=None if self.feedback is None else self.feedback[at],
            packing=packing,
            index=None if self.hidden is not None else RowIndex.of(segment),
            context=None
            if self.context is None
            else self.context.context_of_pairs(indices, epoch=epoch),
        )
        if self.hidden is None:
            return batch
        distinct, texts = self.hidden.of_pair[at].unique(return_inverse=True)
        keys = None if self.hidden.keys is None else self.hidden.keys[distinct]
        return batch.pooled(self.hidden.values[distinct], texts, keys)

    def _packing(self, input_ids: Tensor, segment: Tensor, at: Tensor) -> RowPacking | None:
        """Return how the rows of pairs at indices [B] are packed; those of a group share prefixes."""
        slots, together = self.user_slots, self.layout is packed
        can_share = slots.n_vectors == 0 or (slots.n_contexts is None and slots.same_for_user)
        has_ratings = self.feedback is not None and self.feedback.rating is not None
        if not (self.groups is not None or has_ratings) or not (together and can_share):
            return RowPacking.of(segment, slots, together=together)
        users = self.user_id[at].tolist() if slots.n_vectors > 0 else [0] * len(at)
        groups = at if self.groups is None else self.groups.number[at.numpy()]
        trees = list(zip(groups.tolist(), users, strict=True))
        return share_prefixes(input_ids, segment, trees, n_vectors=slots.n_vectors)

    def shard(self, indices: Sequence[int], shard: RankShard, *, epoch: int = 0) -> PreferenceBatch:
        """Return one rank's part of the batch at these indices.

        Pairs have weights, such that the mean over ranks of the weighted sums is the mean over the
        whole batch. With fewer pairs than ranks, some ranks get a pair of weight 0, because every rank
        must take part in every step.
        """
        if shard.world_size == 1:
            return self.batch(indices, epoch=epoch)
        own = indices[shard.rank :: shard.world_size]
        if self.groups is not None:
            own = self.groups.shard(indices, shard.rank, shard.world_size)
        weight = shard.world_size / len(indices) if len(own) > 0 else 0.0
        batch = self.batch(own if len(own) > 0 else indices[:1], epoch=epoch)
        return replace(batch, weight=torch.full((len(batch),), weight))

    @classmethod
    def from_tokens(cls, pairs: Sequence[TokenPair], *, layout: Layout = packed) -> Self:
        """Make a dataset of pairs of the generic user, to compute values of their texts."""
        row = Row(prompt="", chosen="", rejected="", user_id="", prompt_id="", pair_id="")
        rows = Rows.from_rows([row]).select(np.zeros(len(pairs), dtype=np.int64))
        schema = FeatureSchema.fit(())
        return cls(rows, pairs, layout=layout, user_index={}, schema=schema)


def feedback_of(rows: Sequence[Row]) -> Feedback | None:
    """Return the feedback of rows, [N]; None if they are plain choices that all count alike.

    Weights are divided by their mean, so that the mean loss has the same size with and without them.
    """

    def column(name: str) -> list[Any]:
        values = rows.texts(name) if isinstance(rows, Rows) else (getattr(r, name) for r in rows)
        return list(values)

    verdicts, weights, strengths = map(column, ("verdict", "weight", "strength"))
    choice, levels = choices_among_several(rows), column("rating_level")
    if choice is None and all(one is None for one in (*verdicts, *weights, *strengths, *levels)):
        return None
    rating = torch.tensor([-1 if one is None else int(one) for one in levels])
    rated = rating if bool((rating >= 0).any()) else None
    weight, strength = (
        torch.tensor([1.0 if one is None else float(one) for one in column_of])
        for column_of in (weights, strengths)
    )
    is_tie = torch.tensor([one == "tie" for one in verdicts])
    return Feedback(is_tie, weight / weight.mean(), strength, choice, rated)


def choices_among_several(rows: Sequence[Row]) -> Tensor | None:
    """Number the choices of rows, [N] int64; None if each row is a choice of its own.

    Rows of one group, prompt and chosen response are one choice among that response and all rejected ones.
    """
    ids = rows.texts("group_id") if isinstance(rows, Rows) else (row.group_id for row in rows)
    if all(one is None for one in ids):
        return None
    numbers: dict[object, int] = {}
    found = []
    for place, row in enumerate(rows):
        is_own = row.group_id is None or row.verdict is not None
        parts = (row.conversation_id, row.group_id, row.user_id, str(row.prompt), row.chosen)
        key = place if is_own else hash(parts)
        found.append(numbers.setdefault((is_own, key), len(numbers)))
    return torch.tensor(found) if len(numbers) < len(found) else None


class RestrictedDatasets(dict[str, PairDataset]):
    """Datasets of some splits; asking for another split raises a `LookupError` that says why."""

    def __missing__(self, split: str) -> PairDataset:
        raise LookupError(
            f"{split} pairs are closed here: only {', '.join(self)} may be looked at while a model "
            "is trained and its best checkpoint chosen"
        )


def longest_first(dataset: PairDataset) -> Indices:
    """Return the indices [N] of all pairs, sorted by the length of their longest row, longest first."""
    return np.argsort(-dataset.row_lengths().max(axis=1), kind="stable")


def batches_by_length(dataset: PairDataset, size: int) -> list[list[int]]:
    """Divide all pairs into batches of at most `size`, or of a group that is larger, longest first."""
    order = longest_first(dataset)
    if dataset.groups is not None:
        return dataset.groups.cut(order, size)
    return [order[start : start + size].tolist() for start in range(0, len(order), size)]
