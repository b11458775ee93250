"""Groups of pairs that must be in one batch, as those of a ranking."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from plrhf.data.rows import Row, Rows
from plrhf.data.store import Indices


class Groups:
    """Which pairs of a split belong together; a pair without a group is one of its own.

    Args:
        ids: group of each pair, or None, [N].

    Attributes:
        number: of each pair's group, [N] int64, by first appearance.
    """

    def __init__(self, ids: Iterable[str | None]) -> None:
        numbers: dict[object, int] = {}
        keys = (place if one is None else one for place, one in enumerate(ids))
        self.number = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64)
        self._members = np.argsort(self.number, kind="stable")
        self._ends = np.cumsum(np.bincount(self.number, minlength=1))

    def __len__(self) -> int:
        return int(self.number.max(initial=-1)) + 1

    def pairs(self, groups: Indices) -> Indices:
        """Return the indices of the pairs of these groups, group by group."""
        spans = (self._members[self._start(one) : self._ends[one]] for one in groups)
        return np.concatenate([np.empty(0, np.int64), *spans])

    def _start(self, group: int) -> int:
        return 0 if group == 0 else int(self._ends[group - 1])

    def shard(self, indices: Sequence[int], rank: int, world_size: int) -> list[int]:
        """Return one rank's pairs of a batch, whose groups are dealt to the ranks in turn."""
        place: dict[int, int] = {}
        return [
            one
            for one in indices
            if place.setdefault(int(self.number[one]), len(place)) % world_size == rank
        ]

    def cut(self, order: Indices, size: int) -> list[list[int]]:
        """Divide pairs into batches of about `size`, each with whole groups.

        Args:
            order: all pairs; groups are taken by their first pairs.
        """
        firsts = dict.fromkeys(self.number[order].tolist())
        batches: list[list[int]] = [[]]
        for group in firsts:
            members = self.pairs(np.array([group])).tolist()
            if len(batches[-1]) > 0 and len(batches[-1]) + len(members) > size:
                batches.append([])
            batches[-1] += members
        return batches if len(batches[0]) > 0 else []


def groups_of(rows: Sequence[Row]) -> Groups | None:
    """Return the groups of rows; None if each row is one of its own."""
    ids = list(rows.texts("group_id")) if isinstance(rows, Rows) else [r.group_id for r in rows]
    found = None if all(one is None for one in ids) else Groups(ids)
    return None if found is None or len(found) == len(ids) else found
