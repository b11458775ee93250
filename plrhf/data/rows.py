"""What a preference row is, every reason to refuse one, and where the good ones are kept."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from hashlib import blake2b
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from plrhf.core.errors import BadValue, bad_value
from plrhf.data.store import Indices, LazySequence, TextTable, in_blocks

Message = dict[str, str]
"""One turn of a chat prompt: ``role`` and ``content``."""

Features = Mapping[str, float | str]
"""What is known of a user: feature name -> number or category."""

SPLITS = ("train", "val", "test")
REQUIRED_FIELDS = ("prompt", "chosen", "rejected", "user_id")
ID_FIELDS = ("user_id", "prompt_id", "pair_id", "chosen_id", "rejected_id")
ON_BAD_ROW = ("refuse", "error")


class Reason(StrEnum):
    """Why a row is refused; the text is what reports show."""

    MISSING_FIELD = "missing field"
    NOT_TEXT = "field that is not text"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_RESPONSE = "empty response"
    SAME_RESPONSES = "chosen equal to rejected"
    DUPLICATE_PAIR_ID = "duplicate pair id"
    UNKNOWN_SPLIT = "unknown split"
    BAD_USER_FEATURES = "bad user features"
    BAD_UTF8 = "bad UTF-8"
    BAD_JSON = "bad JSON"
    NOT_AN_OBJECT = "not a JSON object"
    BAD_CSV = "bad CSV"
    BAD_SHAPE = "record unlike the dataset's"
    TIE = "no response preferred"
    # Left out by a source's protocol: nothing is wrong with them.
    OTHER_POLICY = "policy not of the paper's selection"
    UNSEEN_OUTSIDE_TEST = "unseen user outside test"
    PROMPT_IN_TWO_SPLITS = "prompt of a later split"
    REPEATED = "repeated judgment"
    NO_PAIR = "turn without chosen and rejected reply"
    NO_CONVERSATION = "user without a finished conversation"


BY_PROTOCOL = frozenset(
    {
        Reason.OTHER_POLICY,
        Reason.UNSEEN_OUTSIDE_TEST,
        Reason.PROMPT_IN_TWO_SPLITS,
        Reason.REPEATED,
        Reason.NO_PAIR,
        Reason.NO_CONVERSATION,
    }
)
"""Reasons that say what a dataset's protocol leaves out; with ``on_bad_row=error`` they count too."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a source yields in place of a record it could not read."""

    reason: Reason
    detail: str  # one line; `read_rows` puts the place in front


class RefusedRow(BadValue):
    """A row that cannot be used; the message names place, field, value, what is allowed, cure."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


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
    def of(cls, rows: Iterable[Row]) -> Self:
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

    def __reduce__(self) -> Any:
        return Rows.of, (list(self),)  # its own rows, not the file's others


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


@dataclass
class ReadReport:
    """How many records were read, how many refused for which reason, and the first of each."""

    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def content_hash(*content: object) -> str:
    """Return 16 hexadecimal digits that depend on the JSON-able content alone, in any process."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    # Sources hash text before it is checked, lone surrogates included.
    return blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def parse_row(raw: Mapping[str, Any], where: str) -> Row:
    """Return the checked row of one record, or raise `RefusedRow`, so bad data never trains.

    In optional fields null, NaN and blank text count as absent. An absent ``prompt_id`` becomes a
    hash of the prompt, an absent ``pair_id`` one of prompt, chosen, rejected and user.
    Fields that are not in `ROW_FIELDS` are ignored.

    Args:
        raw: field name -> value.
        where: where the record stands, e.g. ``pairs.jsonl:17``; starts every message.
    """
    prompt = _prompt(raw, where)
    chosen, rejected = (_response(raw, name, where) for name in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        cure = "Leave out ties: they hold no preference"
        _refuse(Reason.SAME_RESPONSES, where, "rejected", rejected, "a text unlike chosen", cure)
    user_id = _required_text(raw, "user_id", where)
    if not user_id.strip():
        cure = "Say who made the choice"
        _refuse(Reason.MISSING_FIELD, where, "user_id", user_id, "text that is not blank", cure)
    split = _optional_text(raw, "split", where)
    if split is not None and split not in SPLITS:
        cure = "Rename it, or leave split out of every row"
        _refuse(Reason.UNKNOWN_SPLIT, where, "split", split, "train, val or test", cure)
    return Row(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        user_id=user_id,
        prompt_id=_optional_text(raw, "prompt_id", where) or content_hash(prompt),
        pair_id=_optional_text(raw, "pair_id", where)
        or content_hash(prompt, chosen, rejected, user_id),
        user_text=_optional_text(raw, "user_text", where),
        user_features=parse_features(raw.get("user_features"), where),
        split=split,
        chosen_id=_optional_text(raw, "chosen_id", where),
        rejected_id=_optional_text(raw, "rejected_id", where),
    )


def parse_features(value: object, where: str) -> dict[str, float | str] | None:
    """Return user features with numbers as float and booleans as ``"true"``/``"false"``.

    Null and NaN values are left out, and no features at all is None. Raises `RefusedRow` for
    anything but names -> finite number, text or boolean.
    """
    if _is_absent(value):
        return None
    if not isinstance(value, Mapping):
        cure = 'Write e.g. {"age": 31, "region": "north"}'
        allowed = "an object of feature names and values"
        _refuse(Reason.BAD_USER_FEATURES, where, "user_features", value, allowed, cure)
    features: dict[str, float | str] = {}
    for name, entry in value.items():
        if not isinstance(name, str) or not name.strip():
            cure = "Name every feature"
            _refuse(Reason.BAD_USER_FEATURES, where, "user_features", name, "a text name", cure)
        _check_utf8(name, "user_features", where)
        if not _is_absent(entry):
            features[name] = _feature(entry, f"user_features.{name}", where)
    return features if len(features) > 0 else None


def read_rows(
    records: Iterable[tuple[str, Mapping[str, Any] | Refusal]], *, on_bad_row: str = "refuse"
) -> tuple[Rows, ReadReport]:
    """Return the good rows in their order and an account of every record, so none is lost silently.

    Rows without a ``pair_id`` that are alike in prompt, responses and user are numbered: a
    judgment given twice counts twice.

    Args:
        records: pairs of place and record (or the source's refusal), as `Source.records` yields.
        on_bad_row: ``refuse`` counts a bad row and goes on, ``error`` raises its `RefusedRow`;
            what a protocol leaves out (`BY_PROTOCOL`) is counted either way.
    """
    if on_bad_row not in ON_BAD_ROW:
        cure = "Set data.on_bad_row=refuse to count bad rows and go on"
        raise bad_value("data.on_bad_row", on_bad_row, "refuse or error", cure)
    report = ReadReport()
    return Rows.of(_good(records, report, strict=on_bad_row == "error")), report


def _good(
    records: Iterable[tuple[str, Mapping[str, Any] | Refusal]], report: ReadReport, *, strict: bool
) -> Iterator[Row]:
    """Yield the good rows; the others go into the report."""
    first: dict[int, int] = {}  # hash of a pair_id -> the record that had it
    repeats: Counter[str] = Counter()  # derived pair_id -> how often it came again
    for where, record in records:
        report.read += 1
        try:
            if isinstance(record, Refusal):
                raise RefusedRow(record.reason, f"{where}: {record.detail}")
            row = parse_row(record, where)
            if hash(row.pair_id) in first and _optional_text(record, "pair_id", where) is None:
                repeats[row.pair_id] += 1
                row = replace(row, pair_id=f"{row.pair_id}-{repeats[row.pair_id] + 1}")
            key = hash(row.pair_id)  # 64 bits: of 10 million, two coincide once in 400,000 runs
            if key in first:
                cure = f"Give every row its own: record {first[key]:,} has it too"
                allowed = "an id used once"
                _refuse(Reason.DUPLICATE_PAIR_ID, where, "pair_id", row.pair_id, allowed, cure)
        except RefusedRow as refused:
            if strict and refused.reason not in BY_PROTOCOL:
                raise
            report.refused[refused.reason.value] += 1
            report.examples.setdefault(refused.reason.value, str(refused))
        else:
            first[key] = report.read
            yield row


def _refuse(
    reason: Reason, where: str, name: str, value: object, allowed: str, cure: str
) -> NoReturn:
    raise RefusedRow(reason, f"{where}: {bad_value(name, value, allowed, cure)}")


def _is_absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_utf8(text: str, name: str, where: str) -> None:
    """Refuse lone surrogates: JSON escapes and undecodable bytes bring them, tokenizers choke."""
    try:
        text.encode()
    except UnicodeEncodeError:
        cure = "Save the file as UTF-8 and pair every \\ud800-\\udfff escape"
        _refuse(Reason.BAD_UTF8, where, name, text, "valid Unicode text", cure)


def _checked_text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        cure = "Write it as one string, not as a list, number or object"
        _refuse(Reason.NOT_TEXT, where, name, value, "text", cure)
    _check_utf8(value, name, where)
    return value


def _required_text(raw: Mapping[str, Any], name: str, where: str) -> str:
    _check_present(raw, name, where)
    return _checked_text(raw[name], name, where)


def _check_present(raw: Mapping[str, Any], name: str, where: str) -> None:
    if _is_absent(raw.get(name)):
        cure = f"Add {name} to the row or map it with data.columns.{name}=COLUMN"
        allowed = "a value in every row"
        _refuse(Reason.MISSING_FIELD, where, name, raw.get(name), allowed, cure)


def _optional_text(raw: Mapping[str, Any], name: str, where: str) -> str | None:
    value = raw.get(name)
    if _is_absent(value):
        return None
    text = _checked_text(value, name, where)
    return text if text.strip() else None


def _response(raw: Mapping[str, Any], name: str, where: str) -> str:
    text = _required_text(raw, name, where)
    if not text.strip():
        cure = "Leave the row out"
        _refuse(Reason.EMPTY_RESPONSE, where, name, text, "text that is not blank", cure)
    return text


def _prompt(raw: Mapping[str, Any], where: str) -> str | tuple[Message, ...]:
    """Return the prompt as text, or as messages reduced to role and content."""
    _check_present(raw, "prompt", where)
    value = raw["prompt"]
    if not isinstance(value, (list, tuple)):
        prompt: str | tuple[Message, ...] = _checked_text(value, "prompt", where)
        contents = str(prompt)
    else:
        prompt = tuple(_message(entry, place, where) for place, entry in enumerate(value))
        contents = "".join(message["content"] for message in prompt)
    if not contents.strip():
        cure = "Leave the row out or give the prompt"
        _refuse(Reason.EMPTY_PROMPT, where, "prompt", value, "text that is not blank", cure)
    return prompt


def _message(entry: object, place: int, where: str) -> Message:
    name = f"prompt[{place}]"
    if not isinstance(entry, Mapping):
        cure = 'Write the prompt as text or as [{"role": "user", "content": "..."}]'
        _refuse(Reason.NOT_TEXT, where, name, entry, "an object with role and content", cure)
    for key in ("role", "content"):
        if _is_absent(entry.get(key)):
            cure = "Give every message a role and a content"
            allowed = "a value in every message"
            _refuse(Reason.MISSING_FIELD, where, f"{name}.{key}", None, allowed, cure)
    return {key: _checked_text(entry[key], f"{name}.{key}", where) for key in ("role", "content")}


def _feature(value: object, name: str, where: str) -> float | str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        _check_utf8(value, name, where)
        return value
    if isinstance(value, (int, float)) and abs(value) <= 3.4e38:  # float32's range
        return float(value)
    cure = "Write a number as 31 and a category as text"
    _refuse(Reason.BAD_USER_FEATURES, where, name, value, "a finite number or text", cure)
