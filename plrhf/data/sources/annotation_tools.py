"""Rows from the exports of annotation tools: Label Studio and Argilla.

Label Studio: https://labelstud.io/guide/export, tags Pairwise and Choices, as JSON, minimal JSON and CSV.
Argilla 2: https://docs.argilla.io, `records.to_json`, questions of labels, rankings and ratings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from plrhf.data.reasons import Reason, Refusal, refusal
from plrhf.data.sources.base import id_as_text
from plrhf.data.sources.columns import json_or_text
from plrhf.data.sources.comparisons import (
    WINNER_COLUMNS,
    Comparison,
    comparison_of,
    first_of,
    row_of,
    winner_of,
)
from plrhf.data.sources.formats import Record

WINNER = "winner"
MINIMAL = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")
"""Columns that Label Studio adds to a task's fields and marks in its minimal JSON."""

M = TypeVar("M", bound=BaseModel)


def is_label_studio(names: Collection[str]) -> bool:
    """Whether these are the keys of a Label Studio task with annotations."""
    return {"data", "annotations"} <= set(names)


def is_label_studio_minimal(names: Collection[str]) -> bool:
    """Whether these are the keys of a Label Studio annotation in minimal JSON."""
    return {"id", "annotator", "annotation_id", "lead_time"} <= set(names)


def is_argilla(names: Collection[str]) -> bool:
    """Whether these are the keys of an Argilla record."""
    return {"fields", "responses"} <= set(names)


class _Region(BaseModel):
    """One mark of a Label Studio annotation."""

    type: str = ""
    value: dict[str, Any] = {}


class _Annotation(BaseModel):
    """What one person did with a Label Studio task."""

    result: list[_Region] | None = None
    was_cancelled: bool = False
    completed_by: Any = None  # a number, or a mapping with id and email

    @property
    def user_id(self) -> object:
        """The id of who annotated."""
        given = self.completed_by
        if isinstance(given, Mapping):
            given = given.get("id", given.get("email"))
        return id_as_text(given)

    @property
    def choice(self) -> object:
        """What was chosen: left or right, or the first of the choices; None if nothing."""
        for region in [] if self.was_cancelled else self.result or []:
            if region.type == "pairwise":
                return region.value.get("selected")
            choices = region.value.get("choices")
            if region.type == "choices" and isinstance(choices, list) and len(choices) > 0:
                return choices[0]
        return None


class _Task(BaseModel):
    """A Label Studio task."""

    data: dict[str, Any]
    annotations: list[Any] | None

    @property
    def answers(self) -> list[Any]:
        """The annotations, each by one person."""
        return self.annotations or []


class _Ranked(BaseModel):
    """A response in an Argilla ranking, the best with rank 1."""

    value: Any
    rank: int | None = None


class _Answer(BaseModel):
    """One person's answer to a question of an Argilla record."""

    value: str | bool | int | float | list[_Ranked] | list[str]
    user_id: Any = None

    @property
    def choice(self) -> object:
        """The best of a ranking, or the label."""
        if not isinstance(self.value, list):
            return self.value
        best = [
            one if isinstance(one, _Ranked) else _Ranked(value=one, rank=place)
            for place, one in enumerate(self.value, 1)
        ]
        best.sort(key=lambda one: one.rank or len(best))
        if len(best) == 0:
            return None
        return "tie" if len(best) > 1 and best[0].rank == best[1].rank else best[0].value


class _ArgillaRecord(BaseModel):
    """A record of Argilla."""

    data: dict[str, Any] = Field(alias="fields")
    responses: dict[str, list[Any] | None] | None

    @property
    def answers(self) -> list[Any]:
        """All persons' answers to all questions."""
        return [answer for given in (self.responses or {}).values() for answer in given or []]


def label_studio_rows(records: Iterator[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    """Turn each annotation of each task into a row. A cancelled or empty one is refused."""
    return _rows(records, _Task, _Annotation)


def label_studio_minimal_rows(
    records: Iterator[tuple[int, Record]],
) -> Iterator[tuple[int, Record]]:
    """Turn each annotation in minimal JSON, which holds its task's fields, into a row."""
    for number, record in records:
        yield number, record if isinstance(record, Refusal) else _minimal_row(record)


def argilla_rows(records: Iterator[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    """Turn each person's answer to each record into a row. A record without answers is refused."""
    return _rows(records, _ArgillaRecord, _Answer)


def _rows(
    records: Iterator[tuple[int, Record]],
    task_kind: type[_Task | _ArgillaRecord],
    answer_kind: type[_Annotation | _Answer],
) -> Iterator[tuple[int, Record]]:
    """Yield a row for each answer to each task. A damaged answer is refused, the others are used."""
    for number, record in records:
        task = record if isinstance(record, Refusal) else _parsed(task_kind, record)
        if isinstance(task, Refusal):
            yield number, task
            continue
        if len(task.answers) == 0:
            yield number, _unanswered(task.answers)
        for given in task.answers:
            answer = _parsed(answer_kind, given)
            if isinstance(answer, Refusal):
                yield number, answer
            elif answer.choice is None:
                yield number, _unanswered(given)
            else:
                yield number, _row(task.data, answer.choice, answer.user_id)


def _minimal_row(record: Mapping[str, Any]) -> Record:
    """Make a row of an annotation, whose marks stand between the columns ``id`` and ``annotator``.

    In CSV, a mark that the first annotation lacks stands behind them.
    """
    names = list(record)
    behind = [name for name in names[names.index("annotator") :] if name not in MINIMAL]
    between = names[names.index("id") + 1 : names.index("annotator")]
    marks = {name: _from_cell(record[name]) for name in (*between, *behind)}
    data = {name: record[name] for name in names if name not in (*marks, *MINIMAL)}
    texts = [name for name, one in marks.items() if isinstance(one, str) and one.strip()]
    regions = [one for mark in marks.values() for one in _regions(mark)]
    choice = _Annotation(result=regions).choice
    if choice is None and len(texts) > 0:
        named = first_of(WINNER_COLUMNS, texts)
        if named is None and len(texts) > 1:
            cure = f"Rename the one that says which response is better to {WINNER}"
            return refusal(Reason.BAD_SHAPE, "record", ", ".join(texts), "one mark", cure)
        choice = record[named or texts[0]]
    if choice is None:
        return _unanswered(regions)
    return _row(data, choice, _Annotation(completed_by=record["annotator"]).user_id)


def _from_cell(value: object) -> object:
    """Parse the JSON that a CSV cell holds; return any other value as it is."""
    is_json = isinstance(value, str) and value.startswith(("[{", "{"))
    return json_or_text(str(value)) if is_json else value


def _regions(value: object) -> list[_Region]:
    """The marks of one tag: of Pairwise and of Choices with several values, lists; else none."""
    found = value if isinstance(value, list) else [value]
    kinds = {"selected": "pairwise", "choices": "choices"}
    return [
        _Region(type=kind, value=one)
        for one in found
        if isinstance(one, dict)
        for key, kind in kinds.items()
        if key in one
    ]


def _parsed(kind: type[M], value: object) -> M | Refusal:
    """Check the shape of a task or an answer, or return the refusal that names what is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "record"
        cure = "Export it again from the annotation tool"
        return refusal(Reason.BAD_SHAPE, field, first["input"], first["msg"].lower(), cure)


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


def _unanswered(value: object) -> Refusal:
    return refusal(Reason.TIE, "answer", value, "a choice", "Nothing: nobody has chosen here")
