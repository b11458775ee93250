"""The checks of one record's fields: what becomes a row, and why anything else is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from plrhf.data.reasons import Reason, refuse
from plrhf.data.rows import SPLITS, Message, Row, content_hash


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
        refuse(Reason.SAME_RESPONSES, where, "rejected", rejected, "a text unlike chosen", cure)
    user_id = _required_text(raw, "user_id", where)
    if not user_id.strip():
        cure = "Say who made the choice"
        refuse(Reason.MISSING_FIELD, where, "user_id", user_id, "text that is not blank", cure)
    split = _optional_text(raw, "split", where)
    if split is not None and split not in SPLITS:
        cure = "Rename it, or leave split out of every row"
        refuse(Reason.UNKNOWN_SPLIT, where, "split", split, "train, val or test", cure)
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
        refuse(Reason.BAD_USER_FEATURES, where, "user_features", value, allowed, cure)
    features: dict[str, float | str] = {}
    for name, entry in value.items():
        if not isinstance(name, str) or not name.strip():
            cure = "Name every feature"
            refuse(Reason.BAD_USER_FEATURES, where, "user_features", name, "a text name", cure)
        _check_utf8(name, "user_features", where)
        if not _is_absent(entry):
            features[name] = _feature(entry, f"user_features.{name}", where)
    return features if len(features) > 0 else None


def _is_absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_utf8(text: str, name: str, where: str) -> None:
    """Refuse lone surrogates: JSON escapes and undecodable bytes bring them, tokenizers choke."""
    try:
        text.encode()
    except UnicodeEncodeError:
        cure = "Save the file as UTF-8 and pair every \\ud800-\\udfff escape"
        refuse(Reason.BAD_UTF8, where, name, text, "valid Unicode text", cure)


def _checked_text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        cure = "Write it as one string, not as a list, number or object"
        refuse(Reason.NOT_TEXT, where, name, value, "text", cure)
    _check_utf8(value, name, where)
    return value


def _required_text(raw: Mapping[str, Any], name: str, where: str) -> str:
    _check_present(raw, name, where)
    return _checked_text(raw[name], name, where)


def _check_present(raw: Mapping[str, Any], name: str, where: str) -> None:
    if _is_absent(raw.get(name)):
        cure = f"Add {name} to the row or map it with data.columns.{name}=COLUMN"
        allowed = "a value in every row"
        refuse(Reason.MISSING_FIELD, where, name, raw.get(name), allowed, cure)


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
        refuse(Reason.EMPTY_RESPONSE, where, name, text, "text that is not blank", cure)
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
        refuse(Reason.EMPTY_PROMPT, where, "prompt", value, "text that is not blank", cure)
    return prompt


def _message(entry: object, place: int, where: str) -> Message:
    name = f"prompt[{place}]"
    if not isinstance(entry, Mapping):
        cure = 'Write the prompt as text or as [{"role": "user", "content": "..."}]'
        refuse(Reason.NOT_TEXT, where, name, entry, "an object with role and content", cure)
    for key in ("role", "content"):
        if _is_absent(entry.get(key)):
            cure = "Give every message a role and a content"
            allowed = "a value in every message"
            refuse(Reason.MISSING_FIELD, where, f"{name}.{key}", None, allowed, cure)
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
    refuse(Reason.BAD_USER_FEATURES, where, name, value, "a finite number or text", cure)
