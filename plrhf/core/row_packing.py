"""Row packing: several short rows in one, or a pair's contexts behind one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plrhf.core.row_index import Extent, extent_of
from plrhf.core.types import PADDING, PROMPT, Pinnable


@dataclass(frozen=True)
class UserSlots:
    """Where a model puts user vectors into its rows.

    Attributes:
        n_vectors: number of vectors for each context; 0 for no user model.
        same_for_user: whether a user's rows of a batch have the same vectors.
        n_contexts: number of contexts in a row, with the vectors of each after the prompt. None:
            vectors are in front of the prompt, and each context has its own rows.
    """

    n_vectors: int = 0
    n_contexts: int | None = None
    same_for_user: bool = field(default=False, compare=False)


NO_USER = UserSlots()


@dataclass
class RowPacking(Pinnable):
    """Where the positions of R rows of length L are in N packed rows of length M.

    It is made with the batches on the CPU, since a GPU would have to wait for the lengths of rows. Each
    of the R rows is its user vectors, then its text. With `n_contexts`, the R rows are those of all
    contexts one after the other. A packed row then has the prompt once, followed by vectors and
    responses of each context: ``prompt | vectors chosen rejected | vectors chosen rejected``.

    Attributes:
        source, target: [K] int64, index of each of the K computed positions among all R * L and among
            all N * M positions.
        read_source, read_target: the same for positions whose hidden states are used. If vectors follow
            the prompt, the prompt's last position gets the hidden state of the last vector, which
            predicts the response.
        branch: context of each packed position, from 1; 0 for prompts, which all contexts see; [N, M]
            int64. None: there is one context.
        n_rows, n_packed, length, packed_length: R, N, L and M.
        n_vectors, n_contexts: see `UserSlots`.
        until: last position of the packed row that sees each position, [N, M] int64, for packings of
            `prefix_sharing`; None: segments, source rows and branches say who sees whom.
        extent: of the packed rows; None: computed when it is needed.
    """

    source: Tensor
    target: Tensor
    read_source: Tensor
    read_target: Tensor
    branch: Tensor | None
    n_rows: int
    n_packed: int
    length: int
    packed_length: int
    n_vectors: int = 0
    n_contexts: int | None = None
    until: Tensor | None = None
    extent: Extent | None = None

    @classmethod
    def of(
        cls, segment: Tensor, slots: UserSlots = NO_USER, *, together: bool = True
    ) -> Self | None:
        """Make the packing of rows with these segments; None if packing saves nothing.

        Args:
            segment: [R, L] int64 on the CPU, of text; all positions but padding are kept.
            slots: where user vectors will be.
            together: whether several texts may share a row, which not all models allow.
        """
        if slots.n_contexts is not None:
            n_prompt, n_text = (segment == PROMPT).sum(dim=1), (segment != PADDING).sum(dim=1)
            length = segment.shape[1]
            made = cls.of_lengths(
                n_prompt.numpy(), n_text.numpy(), slots, length=length, together=together
            )
            return made._with_extent(segment)
        alone = cls._pack_rows(segment, slots.n_vectors) if together else None
        return None if alone is None else alone._with_extent(segment)

    def _with_extent(self, segment: Tensor) -> Self:
        """Return the packing with its extent, computed from the text's segments [R, L]."""
        whole = torch.nn.functional.pad(segment, (self.n_vectors, 0), value=PROMPT)
        whole = whole.repeat(self.n_rows // len(segment), 1)
        extent = extent_of(self.pack(whole, PADDING), self.source_row, self.branch)
        return replace(self, extent=extent)

    @classmethod
    def _pack_rows(cls, segment: Tensor, n_vectors: int) -> Self | None:
        """Pack rows of one context with vectors in front; None if it gives as many rows."""
        n_rows, length = segment.shape[0], segment.shape[1] + n_vectors
        is_kept = torch.nn.functional.pad(segment != PADDING, (n_vectors, 0), value=True)
        packed_rows = first_fit_decreasing(is_kept.sum(dim=1).tolist(), length)
        if len(packed_rows) == n_rows:
            return None
        sources, targets = [], []
        for place, rows in enumerate(packed_rows):
            kept = torch.cat([is_kept[row].nonzero()[:, 0] + row * length for row in rows])
            sources.append(kept)
            targets.append(torch.arange(len(kept)) + place * length)
        source, target = torch.cat(sources), torch.cat(targets)
        return cls(
            source=source,
            target=target,
            read_source=source,
            read_target=target,
            branch=None,
            n_rows=n_rows,
            n_packed=len(packed_rows),
            length=length,
            packed_length=length,
            n_vectors=n_vectors,
        )

    @classmethod
    def of_lengths(
        cls,
        n_prompt: NDArray[np.int64],
        n_text: NDArray[np.int64],
        slots: UserSlots,
        *,
        length: int,
        together: bool = True,
    ) -> Self:
        """Pack rows with the vectors of each context after the prompt.

        Args:
            n_prompt, n_text: [B], number of positions of the prompt, and of the text, in each row of
                one context.
            length: of these rows.
            slots, together: as in `of`; if rows may not be shared, the packing is of one context.
        """
        n_vectors, n_contexts = slots.n_vectors, (slots.n_contexts or 1) if together else 1
        n_rows, length = len(n_prompt), n_vectors + length
        n_own = n_vectors + n_text - n_prompt  # positions of one context alone
        n_all = n_prompt + n_contexts * n_own
        room = int(n_all.max(initial=0))
        groups = [[row] for row in range(n_rows)]
        if together:
            groups = first_fit_decreasing(n_all.tolist(), room)
        start = np.zeros(n_rows, dtype=np.int64)  # of each row among all packed positions
        for place, rows in enumerate(groups):
            before = np.cumsum([0, *n_all[rows[:-1]]])
            start[rows] = place * room + before

        column = np.arange(length)  # vectors, then text
        context = np.arange(n_contexts)[:, None, None]
        start, prompt, text, own = (one[:, None] for one in (start, n_prompt, n_text, n_own))
        in_prompt = (column >= n_vectors) & (column < n_vectors + prompt)  # [B, L]
        in_response = (column >= n_vectors + prompt) & (column < n_vectors + text)
        branch_start = start + prompt + context * own  # [C, B, 1], without the prompt's positions
        of_branch = start + context * own + np.where(column < n_vectors, prompt + column, column)
        target = np.where(in_prompt, start + column - n_vectors, of_branch)  # [C, B, L]
        kept = (column < n_vectors) | in_response | (in_prompt & (context == 0))
        ends_prompt = np.broadcast_to(column == n_vectors + prompt - 1, target.shape)
        read = np.where(ends_prompt, branch_start + n_vectors - 1, target)
        is_read = ends_prompt | in_response
        branch = np.zeros(len(groups) * room, dtype=np.int64)
        branch[target[kept]] = np.broadcast_to(np.where(in_prompt, 0, 1 + context), kept.shape)[
            kept
        ]
        return cls(
            source=torch.tensor(np.flatnonzero(kept)),
            target=torch.tensor(target[kept]),
            read_source=torch.tensor(np.flatnonzero(is_read)),
            read_target=torch.tensor(read[is_read]),
            branch=torch.tensor(branch).view(len(groups), room),
            n_rows=n_contexts * n_rows,
            n_packed=len(groups),
            length=length,
            packed_length=room,
            n_vectors=n_vectors,
            n_contexts=n_contexts,
        )

    def repeated(self, n_times: int) -> RowPacking:
        """Return the packing of the rows repeated `n_times`, each repetition packed in the same way."""
        if n_times == 1:
            return self
        times = torch.arange(n_times, device=self.source.device)[:, None]

        def moved(places: Tensor, n_positions: int) -> Tensor:
            return (places + times * n_positions).flatten()

        n_before, n_after = self.n_rows * self.length, self.n_packed * self.packed_length
        return replace(
            self,
            source=moved(self.source, n_before),
            target=moved(self.target, n_after),
            read_source=moved(self.read_source, n_before),
            read_target=moved(self.read_target, n_after),
            branch=None if self.branch is None else self.branch.repeat(n_times, 1),
            until=None if self.until is None else self.until.repeat(n_times, 1),
            n_rows=self.n_rows * n_times,
            n_packed=self.n_packed * n_times,
        )

    @property
    def slots(self) -> UserSlots:
        """The user slots that the packing is made for."""
        return UserSlots(self.n_vectors, self.n_contexts)

    @property
    def source_row(self) -> Tensor:
        """The row of each packed position, [N, M] int64; -1 for padding.

        The rows of several contexts count as the row of the first context.
        """
        row = self.source.div(self.length, rounding_mode="floor")
        row = row % (self.n_rows // (self.n_contexts or 1))
        found = torch.full((self.n_packed * self.packed_length,), -1, device=row.device)
        return found.index_copy(0, self.target, row).unflatten(0, (self.n_packed, -1))

    def pack(self, values: Tensor, padding: int = 0) -> Tensor:
        """Copy values [R, L, ...] of the rows to packed rows, [N, M, ...]."""
        kept = values.flatten(0, 1).index_select(0, self.source)
        found = kept.new_full((self.n_packed * self.packed_length, *kept.shape[1:]), padding)
        return found.index_copy(0, self.target, kept).unflatten(0, (self.n_packed, -1))

    def unpack(self, values: Tensor) -> Tensor:
        """Copy values [N, M, ...] of packed rows back to the rows, [R, L, ...]; 0 where none is used."""
        kept = values.flatten(0, 1).index_select(0, self.read_target)
        found = kept.new_zeros(self.n_rows * self.length, *kept.shape[1:])
        return found.index_copy(0, self.read_source, kept).unflatten(0, (self.n_rows, -1))


def first_fit_decreasing(lengths: list[int], room: int) -> list[list[int]]:
    """Assign rows to packed rows of length `room`: longest first, each to the first that has room.

    It needs at most 11/9 of the smallest possible number plus 6/9 (Dosa 2007, doi
    10.1007/978-3-540-74450-4_1).

    Args:
        lengths: of the rows, each at most `room`.

    Returns:
        For each packed row, the indices of its rows in order.
    """
    packed_rows: list[list[int]] = []
    free: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        place = next((at for at, left in enumerate(free) if lengths[row] <= left), len(free))
        if place == len(free):
            packed_rows.append([])
            free.append(room)
        packed_rows[place].append(row)
        free[place] -= lengths[row]
    return packed_rows
