"""Reasons why rows are refused, and the error and the record that carry them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NoReturn

from plrhf.core.errors import BadValue, bad_value


class Reason(StrEnum):
    """Why a row is refused; the text is shown in the terminal and in the report."""

    MISSING_FIELD = "missing field"
    NOT_TEXT = "field that is not text"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_RESPONSE = "empty response"
    SAME_RESPONSES = "chosen equal to rejected"
    DUPLICATE_PAIR_ID = "duplicate pair id"
    UNKNOWN_SPLIT = "unknown split"
    BAD_USER_FEATURES = "bad user features"
    BAD_WEIGHT = "bad weight or strength"
    UNKNOWN_VERDICT = "unknown verdict"
    BAD_RATING = "rating outside the scale"
    BAD_RANKING = "ranking with repeats or too few responses"
    BAD_OPTIONS = "options or choice that cannot be read"
    BAD_MESSAGES = "bad chat messages"
    BAD_UTF8 = "bad UTF-8"
    BAD_JSON = "bad JSON"
    NOT_AN_OBJECT = "not a JSON object"
    BAD_CSV = "bad CSV"
    BAD_PARQUET = "bad parquet value"
    BAD_SHAPE = "record unlike the dataset's"
    TOO_LARGE = "row too large"
    TIE = "no response preferred"
    NO_OTHER_RATING = "rating in no pair"
    LEFT_OUT = "user in data.without_users"
    # Found when rows are turned into tokens.
    CHAT_TEMPLATE = "prompt that the chat template refuses"
    # Left out by a source's protocol: nothing is wrong with these records.
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
        Reason.NO_OTHER_RATING,
        Reason.LEFT_OUT,
    }
)
"""Reasons for records that a dataset's protocol or the caller leaves out. They are counted even with
``on_bad_row=error``."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a source yields instead of a record that it cannot read."""

    reason: Reason
    detail: str  # one line; `read_rows` puts the place in front


class RefusedRow(BadValue):
    """A row that cannot be used; the message names place, field, value, what is allowed, cure."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def refuse(
    reason: Reason, where: str, field: str, value: object, allowed: str, cure: str
) -> NoReturn:
    """Raise the `RefusedRow` of one field of the record at `where`."""
    raise RefusedRow(reason, f"{where}: {bad_value(field, value, allowed, cure)}")


def refuse_surrogates(text: str, where: str, field: str, value: object) -> None:
    """Refuse text with lone surrogates, which tokenizers cannot encode.

    They stand for bytes of another encoding in a file (U+DC80 to U+DCFF) or are halves of JSON escapes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        is_byte = "\udc80" <= text[error.start] <= "\udcff"
        cure = "Save the file as UTF-8" if is_byte else "Pair every \\ud800-\\udfff escape"
        refuse(Reason.BAD_UTF8, where, field, value, "valid Unicode text", cure)


def refusal(reason: Reason, field: str, value: object, allowed: str, cure: str) -> Refusal:
    """Return a `Refusal`, with the details in the form of all errors."""
    return Refusal(reason, str(bad_value(field, value, allowed, cure)))
