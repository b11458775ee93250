"""Rows from two responses and a winner, as chat arenas publish them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from plrhf.data.reasons import Reason, Refusal, refusal
from plrhf.data.sources.base import id_as_text
from plrhf.data.sources.columns import messages_or_text
from plrhf.data.sources.formats import Record

USER_COLUMNS = (
    *("user_id", "user", "annotator_id", "annotator", "worker_id", "worker", "rater_id", "rater"),
    *("judge_id", "judge", "participant_id", "participant", "voter_id", "labeler"),
    *("evaluator", "user_name", "user_hash", "judge_hash", "completed_by"),
)
"""Columns that say who judged, the best first."""

PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "input", "context", "post")
RESPONSES = (
    "conversation|response|answer|completion|output|generation|reply|summary|candidate|text|option"
)
WINNER_COLUMNS = (
    *("winner", "choice", "preference", "preferred", "vote", "verdict", "label", "better"),
    *("selected", "judgment", "judgement", "result"),
)
ONE_HOT = ("winner_model_a", "winner_model_b", "winner_tie")
SIDES = (("a", "b"), ("left", "right"), ("1", "2"), ("0", "1"), ("first", "second"))
TIES = ("tie", "both", "neither", "draw", "equal", "same")
NO_ANSWER = ("none", "skip")
TIE = 2
"""What stands for a tie where 0 is the first response and 1 the second."""


class Comparison(NamedTuple):
    """The columns of a comparison.

    Attributes:
        sides: what the names of the two response columns end in, e.g. ("a", "b").
        winner: column that says which is better; None: the columns `ONE_HOT` do.
    """

    first: str
    second: str
    sides: tuple[str, str]
    winner: str | None
    user: str | None
    prompt: str | None


def first_of(candidates: Collection[str], names: Collection[str]) -> str | None:
    """Return the first candidate that is a column, whatever its case and separators; None if none is."""
    plain = {_plain(name): name for name in reversed(list(names))}
    return next((plain[key] for key in map(_plain, candidates) if key in plain), None)


@lru_cache(maxsize=1024)
def _plain(name: str) -> str:
    """Write a column's name as all its spellings are: userId, user-id and USER_ID as userid."""
    return re.sub(r"[\s_-]", "", name.casefold())


def is_comparison(names: Collection[str]) -> bool:
    """Whether there are two responses and a winner."""
    return comparison_of(frozenset(names)) is not None


@lru_cache(maxsize=64)
def comparison_of(names: frozenset[str]) -> Comparison | None:
    """Find the columns of a comparison; None if there are none."""
    winner = first_of(WINNER_COLUMNS, names)
    if winner is None and not names.issuperset(ONE_HOT[:2]):
        return None
    for kind in RESPONSES.split("|"):
        for sides in SIDES:
            found = [_response_column(kind, side, names) for side in sides]
            if None not in found:
                first, second = map(str, found)
                user, prompt = first_of(USER_COLUMNS, names), first_of(PROMPT_COLUMNS, names)
                return Comparison(first, second, sides, winner, user, prompt)
    return None


def _response_column(kind: str, side: str, names: Collection[str]) -> str | None:
    """Find the column of one side's response, e.g. response_a, answer1, left or option B."""
    stem = rf"(model[ _-]?)?{kind}s?"
    wanted = re.compile(rf"{stem}[ _-]?{side}|{side}[ _-]?{stem}", re.IGNORECASE)
    return next((name for name in sorted(names) if wanted.fullmatch(name)), None)


def rows(records: Iterator[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    """Turn comparisons into rows. Unknown winners are refused one by one."""
    for number, record in records:
        yield number, record if isinstance(record, Refusal) else _row(record)


def _row(record: Mapping[str, Any]) -> Record:
    """Turn one comparison into a row, or refuse it."""
    columns = comparison_of(frozenset(record))
    if columns is None:
        names = ", ".join(sorted(record))
        cure = "Give every record both responses and a winner"
        return refusal(Reason.BAD_SHAPE, "record", names, "the columns of a comparison", cure)
    won = _winner(record, columns)
    return won if isinstance(won, Refusal) else row_of(record, columns, won)


def row_of(record: Mapping[str, Any], columns: Comparison, won: int) -> Record:
    """Make the row of a comparison that the first response (`won` is 0), the second (1) or none has won."""
    texts = [_text(record[name]) for name in (columns.first, columns.second)]
    others = {name: value for name, value in record.items() if name not in columns}
    best = 0 if won == TIE else won
    row = {**others, "chosen": texts[best], "rejected": texts[1 - best]}
    if won == TIE:
        row["verdict"] = "tie"
    if columns.user is not None:
        row["user_id"] = id_as_text(record[columns.user])
    if columns.prompt is not None:
        row["prompt"] = _text(record[columns.prompt])
    return row


def _winner(record: Mapping[str, Any], columns: Comparison) -> int | Refusal:
    """Return 0 if the first response is better, 1 if the second is, `TIE`, or a refusal."""
    if columns.winner is None:
        won = [str(record.get(name)).strip() in ("1", "1.0", "True", "true") for name in ONE_HOT]
        if won[0] != won[1]:
            return int(won[1])
        return TIE if won[2] else _unknown(ONE_HOT[0], won)
    return winner_of(record[columns.winner], columns, record)


def winner_of(value: object, columns: Comparison, record: Mapping[str, Any]) -> int | Refusal:
    """Read which response a value names: 0 for the first, 1 for the second, or `TIE`."""
    field = str(columns.winner)
    if value in (columns.first, columns.second):
        return int(value == columns.second)
    said = re.sub(r"[^a-z0-9]", "", str(id_as_text(value)).casefold())
    if value is None or said == "":
        return _unknown(field, value)
    for place, (column, side) in enumerate(
        zip((columns.first, columns.second), columns.sides, strict=True)
    ):
        words = {f"model{side}", f"response{side}", f"answer{side}", f"option{side}"}
        words |= {("first", "second")[place], re.sub(r"[^a-z0-9]", "", column.casefold())}
        if said in (side, ("left", "right")[place]) or said.startswith(tuple(words)):
            return place
    if said.startswith(TIES):
        return TIE
    if said.startswith(NO_ANSWER):
        return refusal(Reason.TIE, field, value, "an answer", "Nothing: nobody has chosen here")
    for place, side in enumerate(columns.sides):  # the name of the model that wrote it
        if value == record.get(f"model_{side}") != record.get(f"model_{columns.sides[1 - place]}"):
            return place
    return _unknown(field, value)


def _unknown(field: str, value: object) -> Refusal:
    allowed = "the name of one side, such as a, model_b, left or 2, or a tie"
    return refusal(Reason.BAD_SHAPE, field, value, allowed, "Write which response is better")


def _text(value: Any) -> Any:
    """Read a text, messages as text, or a list of one text as text (as some exports write it)."""
    if isinstance(value, str) and value.startswith('["'):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    return messages_or_text(value) if isinstance(value, str) else value
