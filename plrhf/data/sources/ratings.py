"""Rows from ratings and thumbs: of two responses that a user rated, the higher one is chosen."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from plrhf.data.messages import is_message_list
from plrhf.data.reasons import Reason, Refusal, refusal
from plrhf.data.sources.base import id_as_text
from plrhf.data.sources.comparisons import PROMPT_COLUMNS, USER_COLUMNS, first_of
from plrhf.data.sources.formats import Record
from plrhf.data.split_by import uniform_hash

RESPONSE_COLUMNS = (
    *("response", "completion", "answer", "output", "reply", "text", "comment-body", "comment"),
    *("statement", "joke", "review", "item", "title"),
)
RATING_COLUMNS = ("rating", "score", "stars", "thumbs", "thumb", "label", "vote", "feedback")
HIGH = ("true", "up", "thumbsup", "thumbs_up", "good", "like", "liked", "yes", "positive", "agree")
LOW = ("false", "down", "thumbsdown", "thumbs_down", "bad", "dislike", "no", "negative", "disagree")

MOST_PAIRS = 30
"""Largest number of pairs made of one user's ratings on one prompt."""

NO_PROMPT = "Which of these do you prefer?"
"""Prompt of ratings that have none."""


class Rated(NamedTuple):
    """A response (text, or messages that `parse_row` turns into text), its rating, its record's number."""

    number: int
    response: Any
    rating: float
    others: Mapping[str, Any]


def is_rating(names: Collection[str]) -> bool:
    """Whether there are a response and a rating."""
    return first_of(RESPONSE_COLUMNS, names) is not None and (
        first_of(RATING_COLUMNS, names) is not None
    )


def rows(
    records: Iterator[tuple[int, Record]], scale: Sequence[int] | None = None
) -> Iterator[tuple[int, Record]]:
    """Pair the responses that one user rated differently on one prompt, in one split.

    At most `MOST_PAIRS` of them are made for each user and prompt, drawn by a hash. A rating that is in
    no pair is refused, and counted.

    Args:
        scale: lowest and highest rating, whole numbers. Each rating is then a row of its own, too, with
            its ``rating_level``; one outside the scale is refused. None: any number is a rating.
    """
    groups: dict[tuple[Any, ...], list[Rated]] = defaultdict(list)
    prompts: dict[str, Any] = {}
    for number, record in records:
        found = record if isinstance(record, Refusal) else _rated(number, record)
        if isinstance(found, Refusal):
            yield number, found
            continue
        key, prompt, rated = found
        if scale is not None:
            one = _rating_row(key[0], prompt, rated, scale)
            yield number, one
            if isinstance(one, Refusal):
                continue
        prompts.setdefault(key[1], prompt)
        groups[*key, str(rated.others.get("split"))].append(rated)
    for (user, prompt_key, _), of_group in groups.items():
        for number, row in _pairs(user, prompts[prompt_key], of_group):
            if scale is None or not isinstance(row, Refusal):  # else it is a row of its own
                yield number, row


def _rating_row(user: Any, prompt: Any, rated: Rated, scale: Sequence[int]) -> Record:
    """Return the row of one rating, or a refusal if it is not on the scale."""
    lowest, highest = scale
    level = rated.rating - lowest
    if level != int(level) or not 0 <= level <= highest - lowest:
        allowed = f"a whole number from {lowest} to {highest}"
        cure = "Mend it, or set model.rating_scale to the scale of the ratings"
        return refusal(Reason.BAD_RATING, "rating", rated.rating, allowed, cure)
    row = {**rated.others, "prompt": prompt, "chosen": rated.response, "rejected": rated.response}
    row.pop("pair_id", None)
    row["rating_level"] = int(level)
    return row if user is None else {**row, "user_id": user}


def _rated(number: int, record: Mapping[str, Any]) -> tuple[tuple[Any, str], Any, Rated] | Refusal:
    """Return a record's user and prompt, its prompt, and what was rated; or a refusal."""
    names = list(record)
    response, rating = first_of(RESPONSE_COLUMNS, names), first_of(RATING_COLUMNS, names)
    user, prompt_name = first_of(USER_COLUMNS, names), first_of(PROMPT_COLUMNS, names)
    if response is None or rating is None:
        cure = "Give every record a response and a rating"
        return refusal(Reason.BAD_SHAPE, "record", ", ".join(names), "both columns", cure)
    value = rating_value(record[rating])
    if value is None:
        allowed = "a number, true or false, or a thumb up or down"
        cure = "Write the rating as such"
        return refusal(Reason.BAD_SHAPE, rating, record[rating], allowed, cure)
    if not isinstance(record[response], str) and not is_message_list(record[response]):
        allowed, cure = "text or messages", "Write the response as text"
        return refusal(Reason.NOT_TEXT, response, record[response], allowed, cure)
    prompt = NO_PROMPT if prompt_name is None else record[prompt_name]
    used = {response, rating, user, prompt_name}
    others = {name: one for name, one in record.items() if name not in used}
    who = None if user is None else id_as_text(record[user])
    key = (who if isinstance(who, str) else None, json.dumps(prompt, default=str))
    return key, prompt, Rated(number, record[response], value, others)


def rating_value(value: object) -> float | None:
    """Read a rating: a number, a truth value, or a word for a thumb; None if it is none of these."""
    word = str(value).strip().casefold().replace(" ", "_")
    if word in HIGH or word == "👍":
        return 1.0
    if word in LOW or word == "👎":
        return 0.0
    try:
        number = float(value if isinstance(value, (bool, int, float)) else word)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _pairs(user: Any, prompt: Any, rated: list[Rated]) -> Iterator[tuple[int, Record]]:
    """Yield the pairs of one user's ratings on one prompt, and refusals of ratings in no pair."""
    pairs = [(one, two) for one, two in combinations(rated, 2) if one.rating != two.rating]
    if len(pairs) > MOST_PAIRS:
        pairs.sort(
            key=lambda pair: uniform_hash(
                f"{user} {pair[0].number} {pair[1].number}", salt="rated pair", seed=0
            )
        )
        pairs = pairs[:MOST_PAIRS]
    paired = {one.number for pair in pairs for one in pair}
    for one in rated:
        if one.number not in paired:
            alike = len({other.rating for other in rated}) == 1
            allowed = (
                "another rating of this user and prompt that differs"
                if alike
                else f"at most {MOST_PAIRS} pairs of a user and prompt"
            )
            cure = "Nothing, if this is so: it holds no choice"
            yield one.number, refusal(Reason.NO_OTHER_RATING, "rating", one.rating, allowed, cure)
    for one, two in sorted(pairs, key=lambda pair: (pair[0].number, pair[1].number)):
        high, low = (one, two) if one.rating > two.rating else (two, one)
        row = {**high.others, "prompt": prompt, "chosen": high.response, "rejected": low.response}
        if user is not None:
            row["user_id"] = user
        yield high.number, row
