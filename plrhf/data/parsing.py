"""Checks the fields of a record, and turns it into a row or refuses it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from plrhf.data.digests import content_hash
from plrhf.data.messages import (
    has_content,
    is_message_list,
    parse_messages,
    split_conversations,
)
from plrhf.data.reasons import Reason, refuse, refuse_surrogates
from plrhf.data.rows import SPLITS, Message, Row

LONGEST_ROW = 500_000
"""Largest number of bytes of text in a row by default, so that a block of rows takes little memory."""

LONGEST_LINE = 8 * LONGEST_ROW
"""Largest number of bytes in a line of a file; JSON may write one character as six."""

MISSING_WORDS = frozenset({"nan", "NaN", "<NA>", "NaT", "None", "null", "NULL"})
"""Words that programs write for a missing value. As an id, such a word would merge all these rows into
one user."""


def parse_row(raw: Mapping[str, Any], where: str, *, max_bytes: int = LONGEST_ROW) -> Row:
    """Check a record and return its row, or raise `RefusedRow`.

    Null, NaN and blank text in an optional field count as missing. A missing ``prompt_id`` becomes a
    hash of the prompt, and a missing ``pair_id`` a hash of prompt, chosen, rejected and user.
    ``chosen`` and ``rejected`` may be conversations, see `split_conversations`.

    Args:
        raw: field name -> value.
        where: place of the record, e.g. ``pairs.jsonl:17``, with which messages begin.
        max_bytes: of the row's texts together.
    """
    if is_message_list(raw.get("chosen")) and is_message_list(raw.get("rejected")):
        shared = None if _is_absent(raw.get("prompt")) else raw["prompt"]
        said = split_conversations(shared, raw["chosen"], raw["rejected"], where)
        raw = {**raw, **dict(zip(("prompt", "chosen", "rejected"), said, strict=True))}
    prompt = _prompt(raw, where)
    chosen, rejected = (_response(raw, name, where) for name in ("chosen", "rejected"))
    level = _rating_level(raw, where)
    if level is None and chosen.strip() == rejected.strip():
        cure = "Leave out ties: they hold no preference"
        refuse(Reason.SAME_RESPONSES, where, "rejected", rejected, "a text unlike chosen", cure)
    user_id = _required_text(raw, "user_id", where)
    if not user_id.strip() or user_id in MISSING_WORDS:
        cure = "Say who made the choice"
        refuse(Reason.MISSING_FIELD, where, "user_id", user_id, "the id of a person", cure)
    given = {name: read(raw, name, where) for name, read in OPTIONAL.items() if name in raw}
    given["prompt_id"] = given.get("prompt_id") or content_hash(prompt)
    given["pair_id"] = given.get("pair_id") or content_hash(prompt, chosen, rejected, user_id)
    row = Row(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        user_id=user_id,
        rating_level=level,
        **given,
    )
    _check_size(row, where, max_bytes)
    return row


def _split(raw: Mapping[str, Any], name: str, where: str) -> str | None:
    """Return the row's split, in lower case."""
    given = _optional_text(raw, name, where)
    split = None if given is None else given.strip().casefold()
    if split is not None and split not in SPLITS:
        cure = "Rename it, or leave split out of every row"
        refuse(Reason.UNKNOWN_SPLIT, where, name, given, "train, val or test", cure)
    return split


def _verdict(raw: Mapping[str, Any], name: str, where: str) -> str | None:
    """Return "tie" for a tie, and None for a choice."""
    given = _optional_text(raw, name, where)
    verdict = "prefer" if given is None else given.strip().casefold()
    if verdict not in ("prefer", "tie"):
        cure = "Leave out rows in which nothing was judged"
        refuse(Reason.UNKNOWN_VERDICT, where, name, given, "prefer or tie", cure)
    if verdict == "prefer":
        return None
    if _number(raw, "strength", where) is not None:
        allowed, cure = "none in a tie, which prefers no response", "Leave strength or verdict out"
        refuse(Reason.BAD_WEIGHT, where, "strength", raw["strength"], allowed, cure)
    return "tie"


def _number(raw: Mapping[str, Any], name: str, where: str) -> float | None:
    """Return a weight, above 0, or a strength, from 0; None if missing. Table cells may be text."""
    value = raw.get(name)
    if _is_absent(value) or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (0 <= number <= 1e6) or (name == "weight" and number == 0):
        least = "above 0" if name == "weight" else "from 0"
        allowed, cure = f"a number {least}, at most a million", f"Mend {name}, or leave it out"
        refuse(Reason.BAD_WEIGHT, where, name, value, allowed, cure)
    return number


def _rating_level(raw: Mapping[str, Any], where: str) -> int | None:
    """Return the level of a rating, which a source of ratings gives; None if missing."""
    level = raw.get("rating_level")
    if _is_absent(level):
        return None
    if not isinstance(level, int) or isinstance(level, bool) or level < 0:
        allowed, cure = (
            "a whole number from 0",
            "Leave it out, and give ratings as a file of ratings",
        )
        refuse(Reason.BAD_RATING, where, "rating_level", level, allowed, cure)
    return level


def _check_size(row: Row, where: str, most: int) -> None:
    """Refuse a row whose texts have more bytes than `most`."""
    others = [row.chosen, row.rejected, row.user_text or "", row.user_id]
    if isinstance(row.prompt, str):
        prompt = [row.prompt]
    else:
        prompt = [value for one in row.prompt for value in _message_texts(one)]
    # A character takes at most six bytes, escaped in JSON.
    if sum(map(len, prompt + others)) * 6 + 100 * len(prompt) <= most:
        return
    if not isinstance(row.prompt, str):
        prompt = [json.dumps(row.prompt, ensure_ascii=False)]
    size = sum(len(text.encode()) for text in prompt + others)
    if size > most:
        cure = "Shorten its texts, raise data.max_row_bytes or leave the row out"
        allowed = f"texts of at most {most:,} bytes in all"
        refuse(Reason.TOO_LARGE, where, "row", f"{size:,} bytes", allowed, cure)


def _message_texts(message: Message) -> Iterator[str]:
    """Yield the values of a message as text; what is not text, as JSON."""
    for value in message.values():
        yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _features(raw: Mapping[str, Any], name: str, where: str) -> dict[str, float | str] | None:
    """Return the features of the row's user."""
    return parse_features(raw[name], where)


def parse_features(value: object, where: str) -> dict[str, float | str] | None:
    """Check user features, and return numbers as float and booleans as ``"true"`` or ``"false"``.

    Null and NaN values are left out. The result is None if no feature is left. Anything but a
    mapping of names to finite numbers, texts and booleans raises `RefusedRow`.
    """
    if _is_absent(value):
        return None
    if not isinstance(value, Mapping):
        cure = 'Write e.g. {"age": 31, "region": "north"}'
        allowed = "an object of feature names and values"
        refuse(Reason.BAD_USER_FEATURES, where, "user_features", value, allowed, cure)
    features: dict[str, float | str] = {}
    for name, entry in value.items():
        if not isinstance(name, str) or not name.strip():
            cure = "Name every feature"
            refuse(Reason.BAD_USER_FEATURES, where, "user_features", name, "a text name", cure)
        refuse_surrogates(name, where, "user_features", name)
        if not _is_absent(entry):
            features[name] = _feature(entry, f"user_features.{name}", where)
    return features if len(features) > 0 else None


def _is_absent(value: object) -> bool:
    """Whether a value is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _checked_text(value: object, name: str, where: str) -> str:
    """Return a text field; refuse values that are not valid text."""
    if not isinstance(value, str):
        cure = "Write it as one string, not as a list, number or object"
        refuse(Reason.NOT_TEXT, where, name, value, "text", cure)
    refuse_surrogates(value, where, name, value)
    return value


def _required_text(raw: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field that must be text and not blank."""
    _check_present(raw, name, where)
    return _checked_text(raw[name], name, where)


def _check_present(raw: Mapping[str, Any], name: str, where: str) -> None:
    """Refuse a record without this field."""
    if _is_absent(raw.get(name)):
        names = ", ".join(sorted(map(str, raw))[:12])
        cure = f"Add {name} or map it with data.columns.{name}=COLUMN; the row has {names}"
        around = next((str(key) for key, one in raw.items() if _is_list_of_objects(one)), None)
        if around is not None:
            cure += f". If the rows are those in {around}, write that list alone"
        allowed = "a value in every row"
        refuse(Reason.MISSING_FIELD, where, name, raw.get(name), allowed, cure)


def _is_list_of_objects(value: object) -> bool:
    """Whether a value is a list, not empty, of JSON objects."""
    return (
        isinstance(value, list) and len(value) > 0 and all(isinstance(one, dict) for one in value)
    )


def _optional_text(raw: Mapping[str, Any], name: str, where: str) -> str | None:
    """Return an optional text field; None if missing or blank."""
    value = raw.get(name)
    if _is_absent(value):
        return None
    text = _checked_text(value, name, where)
    return text if text.strip() else None


def _optional_id(raw: Mapping[str, Any], name: str, where: str) -> str | None:
    """Return an optional id as text; None if missing."""
    text = _optional_text(raw, name, where)
    return None if text in MISSING_WORDS else text


def has_pair_id(raw: Mapping[str, Any], where: str) -> bool:
    """Whether the record has a pair id of its own."""
    return _optional_id(raw, "pair_id", where) is not None


def _response(raw: Mapping[str, Any], name: str, where: str) -> str:
    """Return a response; refuse blank text."""
    text = _required_text(raw, name, where)
    if not text.strip():
        cure = "Leave the row out"
        refuse(Reason.EMPTY_RESPONSE, where, name, text, "text that is not blank", cure)
    return text


def _prompt(raw: Mapping[str, Any], where: str) -> str | tuple[Message, ...]:
    """Return the prompt as text or as checked messages."""
    _check_present(raw, "prompt", where)
    value = raw["prompt"]
    if isinstance(value, (list, tuple)):
        messages = parse_messages(value, "prompt", where)
        if not has_content(messages):
            _refuse_empty_prompt(value, where)
        return messages
    text = _checked_text(value, "prompt", where)
    if not text.strip():
        _refuse_empty_prompt(value, where)
    return text


def _refuse_empty_prompt(value: object, where: str) -> NoReturn:
    cure = "Leave the row out or give the prompt"
    refuse(Reason.EMPTY_PROMPT, where, "prompt", value, "text that is not blank", cure)


def _feature(value: object, name: str, where: str) -> float | str:
    """Return a feature's value as a float or a text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        refuse_surrogates(value, where, name, value)
        return value
    if isinstance(value, (int, float)) and abs(value) <= 3.4e38:  # float32's range
        return float(value)
    cure = "Write a number as 31 and a category as text"
    refuse(Reason.BAD_USER_FEATURES, where, name, value, "a finite number or text", cure)


OPTIONAL: dict[str, Callable[[Mapping[str, Any], str, str], Any]] = {
    "prompt_id": _optional_id,
    "pair_id": _optional_id,
    "user_text": _optional_text,
    "user_features": _features,
    "split": _split,
    "chosen_id": _optional_id,
    "rejected_id": _optional_id,
    "verdict": _verdict,
    "weight": _number,
    "strength": _number,
    "group_id": _optional_id,
    "conversation_id": _optional_id,
}
"""How each field that a record may lack is read: from the record, by its name, with its place."""
