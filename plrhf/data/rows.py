"""What a preference row is, and where rows are kept."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from plrhf.data.store import Indices, LazySequence, TextTable, in_blocks

Message = dict[str, Any]
"""One turn of a chat prompt: ``role``, ``content`` and whatever else a chat template reads."""

Features = Mapping[str, float | str]
"""What is known of a user: feature name -> number or category."""

SPLITS = ("train", "val", "test")
REQUIRED_FIELDS = ("prompt", "chosen", "rejected", "user_id")
ID_FIELDS = ("user_id", "prompt_id", "pair_id", "chosen_id", "rejected_id")


@dataclass(frozen=True, slots=True)
class Row:
    """One human choice: this user preferred `chosen` to `rejected` as the answer to `prompt`."""

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


ROW_FIELDS = tuple(one.name for one in fields(Row))


@dataclass(frozen=True, slots=True)
class Person:
    """What rows say of the user they are of."""

    user_id: str
    user_text: str | None
    user_features: Features | None


class Rows(LazySequence[Row]):
    """Rows whose texts lie in a file and whose people are numbered: few bytes a row are in memory.

    Attributes:
        people: everybody in the file. person: of each row, its index among them, [N] int32.
    """

    def __init__(
        self, file: TextTable, people: Sequence[Person], indices: Indices, person: NDArray[np.int32]
    ) -> None:
        self._file, self._indices = file, indices
        self.people, self.person = people, person

    @classmethod
    def from_rows(cls, rows: Iterable[Row]) -> Self:
        """The rows, in their order, each taken from the iterable once."""
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
        """The same rows as if these people had chosen."""
        return type(self)(self._file, self.people, self._indices, person)

    def texts(self, name: str) -> Iterator[str | None]:
        """One field of every row, read alone: any but prompt and what is known of users."""
        for (values,) in self._file.read((name,), self._indices):
            yield from values

    def distinct_people(self) -> list[Person]:
        """Who the rows are of, by first appearance."""
        _, first = np.unique(self.person, return_index=True)
        return [self.people[self.person[place]] for place in np.sort(first)]

    def digest(self, *, with_user_text: bool) -> str:
        """A hash of what the rows say: of the whole file, which of its rows, and users' own texts."""
        parts = [self._file.digest, blake2b(self._indices.tobytes()).hexdigest()]
        if with_user_text:
            parts += [
                content_hash([person.user_text for person in self.people]),
                blake2b(self.person.tobytes()).hexdigest(),
            ]
        return content_hash(parts)

    def content_hash(self) -> str:
        """Hash all that the rows hold, every field and their order, and nothing else.

        Equal rows have equal hashes in every process and whatever file they were read from. A million
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


TEXT_COLUMNS = (
    *("prompt", "messages", "chosen", "rejected", "prompt_id", "pair_id"),
    *("split", "chosen_id", "rejected_id"),
)
"""What of a row is text of its own; a prompt is either text or messages, as JSON."""


def _texts(row: Row) -> tuple[str | None, ...]:
    plain = isinstance(row.prompt, str)
    return (
        row.prompt if isinstance(row.prompt, str) else None,
        None if plain else json.dumps(row.prompt, ensure_ascii=False),
        *(row.chosen, row.rejected, row.prompt_id, row.pair_id),
        *(row.split, row.chosen_id, row.rejected_id),
    )


def _row(person: Person, prompt: Any, messages: Any, chosen: Any, rejected: Any, *ids: Any) -> Row:
    prompt_id, pair_id, split, chosen_id, rejected_id = ids
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
    )


def content_hash(*content: object) -> str:
    """Return 16 hexadecimal digits that depend on the JSON-able content alone, in any process."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    # Sources hash text before it is checked, lone surrogates included.
    return blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
