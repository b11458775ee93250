"""What a preference row is, and every reason to refuse one."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from hashlib import blake2b
from typing import Any, NoReturn

from plrhf.errors import BadValue, bad_value

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
) -> tuple[list[Row], ReadReport]:
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
    rows: list[Row] = []
    report = ReadReport()
    places: dict[str, str] = {}  # pair_id -> where it was first seen
    repeats: Counter[str] = Counter()
    for where, record in records:
        report.read += 1
        try:
            if isinstance(record, Refusal):
                raise RefusedRow(record.reason, f"{where}: {record.detail}")
            row = parse_row(record, where)
            if _optional_text(record, "pair_id", where) is None:
                row = _numbered(row, repeats)
            if row.pair_id in places:
                cure = f"Give every row its own: {places[row.pair_id]} has it too"
                allowed = "an id used once"
                _refuse(Reason.DUPLICATE_PAIR_ID, where, "pair_id", row.pair_id, allowed, cure)
        except RefusedRow as refused:
            if on_bad_row == "error" and refused.reason not in BY_PROTOCOL:
                raise
            report.refused[refused.reason.value] += 1
            report.examples.setdefault(refused.reason.value, str(refused))
        else:
            places[row.pair_id] = where
            rows.append(row)
    return rows, report


def _numbered(row: Row, repeats: Counter[str]) -> Row:
    """Return the row with the occurrence number in its derived pair id from the second one on."""
    repeats[row.pair_id] += 1
    occurrence = repeats[row.pair_id]
    return row if occurrence == 1 else replace(row, pair_id=f"{row.pair_id}-{occurrence}")


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
