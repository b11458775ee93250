"""Rows from the exports of annotation tools: Label Studio and Argilla.

Label Studio: https://labelstud.io/guide/export, tags Pairwise and Choices. Argilla 2:
https://docs.argilla.io, `records.to_json`, questions of labels, rankings and ratings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from plrhf.data.reasons import Reason, Refusal, refusal
from plrhf.data.sources.base import id_as_text
from plrhf.data.sources.comparisons import Comparison, comparison_of, row_of, winner_of
from plrhf.data.sources.formats import Record

WINNER = "winner"


def is_label_studio(names: Collection[str]) -> bool:
    """Whether these are the keys of a Label Studio task with annotations."""
    return {"data", "annotations"} <= set(names)


def is_argilla(names: Collection[str]) -> bool:
    """Whether these are the keys of an Argilla record."""
    return {"fields", "responses"} <= set(names)


def label_studio_rows(records: Iterator[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    """Turn each annotation of each task into a row. A cancelled or empty one is refused."""
    for number, task in records:
        if isinstance(task, Refusal):
            yield number, task
            continue
        data = task["data"] if isinstance(task["data"], Mapping) else {}
        annotations = task["annotations"] or []
        if len(annotations) == 0:
            yield number, _unanswered("annotations", annotations)
        for one in annotations:
            value = _label_studio_choice(one)
            if value is None or one.get("was_cancelled"):
                yield number, _unanswered("annotations.result", one.get("result"))
            else:
                yield number, _row(data, value, _annotator(one.get("completed_by")))


def _label_studio_choice(annotation: Mapping[str, Any]) -> object:
    """Return what an annotation chose: left or right, or the first choice; None if nothing."""
    for region in annotation.get("result") or []:
        value = region.get("value") or {}
        if region.get("type") == "pairwise":
            return value.get("selected")
        if region.get("type") == "choices" and len(value.get("choices") or []) > 0:
            return value["choices"][0]
    return None


def _annotator(given: object) -> object:
    """Return the id of who annotated: a number, or a mapping with id and email."""
    if isinstance(given, Mapping):
        given = given.get("id", given.get("email"))
    return id_as_text(given)


def argilla_rows(records: Iterator[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    """Turn each person's answer to each record into a row. A record without answers is refused."""
    for number, record in records:
        if isinstance(record, Refusal):
            yield number, record
            continue
        fields = record["fields"] if isinstance(record["fields"], Mapping) else {}
        answers = [
            answer
            for of_question in (record["responses"] or {}).values()
            for answer in of_question or []
        ]
        if len(answers) == 0:
            yield number, _unanswered("responses", record["responses"])
        for answer in answers:
            yield number, _row(fields, _argilla_choice(answer["value"]), answer.get("user_id"))


def _argilla_choice(value: Any) -> object:
    """Return the best of a ranking, or the label."""
    if isinstance(value, (list, tuple)) and len(value) > 0:
        ranked = [one for one in value if isinstance(one, Mapping)]
        if len(ranked) == len(value):  # [{"value": "response1", "rank": 1}, ...]
            best = sorted(ranked, key=lambda one: one.get("rank") or len(ranked))
            tied = len(best) > 1 and best[0].get("rank") == best[1].get("rank")
            return "tie" if tied else best[0].get("value")
        return value[0]
    return value


def _row(data: Mapping[str, Any], value: object, user: object) -> Record:
    """Make a row of a task's fields and one person's choice."""
    columns = comparison_of(frozenset((*data, WINNER))) or _last_two_texts(data)
    if columns is None:
        cure = "Export tasks whose data hold the prompt and both responses"
        return refusal(Reason.BAD_SHAPE, "data", ", ".join(data), "two responses", cure)
    won = winner_of(value, columns, data)
    row = won if isinstance(won, Refusal) else row_of(data, columns, won)
    return row if isinstance(row, Refusal) else {**row, "user_id": user}


def _last_two_texts(data: Mapping[str, Any]) -> Comparison | None:
    """Take the last two texts of a task as its responses, and the one before them as its prompt."""
    texts = [name for name, one in data.items() if isinstance(one, str)]
    if len(texts) < 2:
        return None
    prompt = texts[-3] if len(texts) > 2 else None
    return Comparison(texts[-2], texts[-1], ("1", "2"), WINNER, user=None, prompt=prompt)


def _unanswered(field: str, value: object) -> Refusal:
    return refusal(Reason.TIE, field, value, "an answer", "Nothing: nobody has chosen here")
