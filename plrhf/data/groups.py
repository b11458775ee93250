"""Groups of pairs that are in one batch: those of a ranking, and the turns of a conversation."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from plrhf.data.packing import TokenPair
from plrhf.data.rows import Row, Rows
from plrhf.data.store import Indices


class Groups:
    """Which pairs of a split belong together; a pair without a group is one of its own.

    Args:
        ids: group of each pair, or None, [N].

    Attributes:
        number: of each pair's group, [N] int64, by first appearance.
    """

    def __init__(self, ids: Iterable[Hashable | None]) -> None:
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


def groups_of(rows: Sequence[Row], *, conversations: bool = True) -> Groups | None:
    """Return the groups of rows; None if each row is one of its own.

    Args:
        conversations: whether a user's turns of a conversation are one group, as they share what they begin
            with; else rows with a `group_id` in common alone are, as they are one choice.
    """
    ids: list[Hashable | None] = [*_column(rows, "group_id")]
    if conversations:
        ids = [
            of if of is not None else one
            for of, one in zip(conversations_of(rows), ids, strict=True)
        ]
    found = None if all(one is None for one in ids) else Groups(ids)
    return None if found is None or len(found) == len(ids) else found


def conversations_of(rows: Sequence[Row]) -> list[tuple[str, str] | None]:
    """Return user and conversation of each row; None for a row outside any conversation."""
    ids = _column(rows, "conversation_id")
    if all(one is None for one in ids):
        return [None] * len(ids)
    if isinstance(rows, Rows):
        users = [rows.people[number].user_id for number in rows.person]
    else:
        users = [row.user_id for row in rows]
    pairs = zip(users, ids, strict=True)
    return [None if one is None else (user, one) for user, one in pairs]


def n_turns_apart(rows: Sequence[Row], pairs: Sequence[TokenPair]) -> int:
    """Count the pairs of later turns whose prompt does not begin with an earlier turn and its reply.

    Such a pair shares fewer tokens with its conversation, as where a chat template writes former turns
    otherwise than the last one, or where they were cut.
    """
    turns: dict[tuple[str, str], list[TokenPair]] = {}
    for place, one in enumerate(conversations_of(rows)):
        if one is not None:
            turns.setdefault(one, []).append(pairs[place])
    count = 0
    for own in turns.values():
        said = {(*one.prompt, *one.chosen) for one in own}
        first = min(len(one.prompt) for one in own)
        later = [one.prompt for one in own if len(one.prompt) > first]
        count += sum(not any(one[: len(reply)] == reply for reply in said) for one in later)
    return count


def _column(rows: Sequence[Row], name: str) -> list[str | None]:
    return list(rows.texts(name)) if isinstance(rows, Rows) else [getattr(r, name) for r in rows]
