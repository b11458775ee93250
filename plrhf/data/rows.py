"""The preference row, and a store of rows in a file."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from plrhf.data.digests import content_hash
from plrhf.data.store import Indices, LazySequence, TextTable, in_blocks

Message = dict[str, Any]
"""One turn of a chat prompt: ``role``, ``content`` and whatever else a chat template reads."""

Features = Mapping[str, float | str]
"""A user's features: feature name -> number or category."""

Ties = Literal["none", "shared", "own"]
"""Whether ties are learned from, and whether all users or each user has a tie parameter."""

SPLITS = ("train", "val", "test")
REQUIRED_FIELDS = ("prompt", "chosen", "rejected", "user_id")
ID_FIELDS = (
    *("user_id", "prompt_id", "pair_id", "chosen_id", "rejected_id", "group_id"),
    "conversation_id",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One human choice: this user preferred `chosen` to `rejected` as the answer to `prompt`.

    Attributes:
        verdict: "tie" if neither response was preferred, else None.
        weight: how often, or how surely, the choice was made, above 0; None: once.
        strength: how much better the chosen response is, from 0; None: not known.
        group_id: rows that have it in common, as those of a ranking, are always in one batch. Those of
            one prompt and chosen response are one choice among several.
        rating_level: of a rating, its level from 0; both responses are then the text that was rated.
        conversation_id: rows that have it in common are turns of one conversation. No two splits share it.
    """

    prompt: str | tuple[Message, ...]
    chosen: str
    rejected: str
    user_id: str
    prompt_id: str
    pair_id: str
    user_text: str | None = None
    user_features: Features | None = None
    split: str | None = None
    chosen_id: str | None = None
    rejected_id: str | None = None
    verdict: str | None = None
    weight: float | None = None
    strength: float | None = None
    group_id: str | None = None
    rating_level: int | None = None
    conversation_id: str | None = None


ROW_FIELDS = tuple(one.name for one in fields(Row))


@dataclass(frozen=True, slots=True)
class Person:
    """A user as described by rows: id, text and features."""

    user_id: str
    user_text: str | None
    user_features: Features | None


class Rows(LazySequence[Row]):
    """A sequence of rows whose texts are in a file, with only a few bytes of each row in memory.

    Attributes:
        people: the distinct users of the file.
        person: index of each row's user in `people`, [N] int32.
    """

    def __init__(
        self, file: TextTable, people: Sequence[Person], indices: Indices, person: NDArray[np.int32]
    ) -> None:
        self._file, self._indices = file, indices
        self.people, self.person = people, person

    @classmethod
    def from_rows(cls, rows: Iterable[Row]) -> Self:
        """Write rows to a file, in one pass over the iterable."""
        people: dict[Any, int] = {}
        known: list[Person] = []
        person = array("i")

        def texts() -> Iterator[list[tuple[str | None, ...]]]:
            for block in in_blocks(rows):
                for row in block:
                    features = row.user_features
                    said = None if features is None else tuple(features.items())
                    number = people.setdefault((row.user_id, row.user_text, said), len(people))
                    if number == len(known):
                        known.append(Person(row.user_id, row.user_text, features))
                    person.append(number)
                yield [_texts(row) for row in block]

        file = TextTable(TEXT_COLUMNS, texts())
        codes = np.frombuffer(person, dtype=np.int32) if len(person) > 0 else np.empty(0, np.int32)
        return cls(file, known, np.arange(len(codes)), codes)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Row]:
        start = 0
        for columns in self._file.read(TEXT_COLUMNS, self._indices):
            people = self.person[start : start + len(columns[0])].tolist()
            start += len(people)
            for number, texts in zip(people, zip(*columns, strict=True), strict=True):
                yield _row(self.people[number], *texts)

    def item(self, index: int) -> Row:
        """Return the row at an index."""
        return next(iter(self.select(np.array([index]))))

    def select(self, indices: Indices) -> Self:
        """Return the rows at these indices."""
        return type(self)(self._file, self.people, self._indices[indices], self.person[indices])

    def with_people(self, person: NDArray[np.int32]) -> Self:
        """Return the same rows with other users, by index in `people`, [N]."""
        return type(self)(self._file, self.people, self._indices, person)

    def texts(self, name: str) -> Iterator[str | None]:
        """Yield one field of every row, without reading the others.

        Args:
            name: any field but the prompt, and those of the user.
        """
        for (values,) in self._file.read((name,), self._indices):
            yield from values

    def distinct_people(self) -> list[Person]:
        """Return the users of the rows, by first appearance."""
        _, first = np.unique(self.person, return_index=True)
        return [self.people[self.person[place]] for place in np.sort(first)]

    def digest(self, *, with_people: bool) -> str:
        """Hash the file, which of its rows these are, and (if asked for) the users' texts and features.

        It is faster than `content_hash`, but equal rows in another file have another digest.
        """
        parts = [self._file.digest, blake2b(self._indices.tobytes()).hexdigest()]
        if with_people:
            parts += [
                content_hash([[one.user_text, one.user_features] for one in self.people]),
                blake2b(self.person.tobytes()).hexdigest(),
            ]
        return content_hash(parts)

    def content_hash(self) -> str:
        """Hash every field and the order of the rows.

        Equal rows have equal hashes in every process, whatever file they were read from. A million
        rows of 2 KiB take a few seconds.
        """
        people = [
            content_hash(one.user_id, one.user_text, one.user_features) for one in self.people
        ]
        of_row = np.array([int(one, 16) for one in people], dtype=np.uint64)[self.person]
        return content_hash(
            self._file.content_hash(self._indices), blake2b(of_row.tobytes()).hexdigest()
        )

    def __reduce__(self) -> Any:
        return Rows.from_rows, (list(self),)  # its own rows, not the file's others


def choices_of(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows in which a response was preferred, without ties and ratings."""
    if not isinstance(rows, Rows):
        return [row for row in rows if row.verdict is None and row.rating_level is None]
    others = zip(rows.texts("verdict"), rows.texts("rating_level"), strict=True)
    is_choice = np.array([one == (None, None) for one in others], dtype=np.bool_)
    return rows if is_choice.all() else rows.select(np.flatnonzero(is_choice))


def people_in(rows: Sequence[Row]) -> Sequence[Row | Person]:
    """Return the users of rows, by first appearance; of a plain list, a user may appear repeatedly."""
    return rows.distinct_people() if isinstance(rows, Rows) else rows


TEXT_COLUMNS = (
    *("prompt", "messages", "chosen", "rejected", "prompt_id", "pair_id"),
    *("split", "chosen_id", "rejected_id", "verdict", "weight", "strength", "group_id"),
    *("conversation_id", "rating_level"),
)
"""Columns of the file. A prompt is in ``prompt`` if it is text, and in ``messages`` (JSON) if not."""


def _texts(row: Row) -> tuple[str | None, ...]:
    """Return a row's values in the order of `TEXT_COLUMNS`."""
    plain = isinstance(row.prompt, str)
    return (
        row.prompt if isinstance(row.prompt, str) else None,
        None if plain else json.dumps(row.prompt, ensure_ascii=False),
        *(row.chosen, row.rejected, row.prompt_id, row.pair_id),
        *(row.split, row.chosen_id, row.rejected_id, row.verdict),
        *(None if one is None else repr(one) for one in (row.weight, row.strength)),
        *(row.group_id, row.conversation_id),
        None if row.rating_level is None else str(row.rating_level),
    )


def _row(person: Person, prompt: Any, messages: Any, chosen: Any, rejected: Any, *ids: Any) -> Row:
    """Make a row of its user and its values in the order of `TEXT_COLUMNS`."""
    prompt_id, pair_id, split, chosen_id, rejected_id, verdict, *rest = ids
    weight, strength = (None if one is None else float(one) for one in rest[:2])
    group_id, conversation_id, level = rest[2:]
    return Row(
        prompt if messages is None else tuple(json.loads(messages)),
        chosen,
        rejected,
        person.user_id,
        prompt_id,
        pair_id,
        person.user_text,
        person.user_features,
        split,
        chosen_id,
        rejected_id,
        verdict,
        weight,
        strength,
        group_id,
        None if level is None else int(level),
        conversation_id,
    )
