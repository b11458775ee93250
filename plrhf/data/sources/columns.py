"""Maps the columns of any table to the fields of a row."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from plrhf.core.errors import bad_value
from plrhf.data.messages import is_message_list
from plrhf.data.reading import may_lack_prompt
from plrhf.data.rows import ID_FIELDS, REQUIRED_FIELDS, ROW_FIELDS
from plrhf.data.sources.base import id_as_text

MESSAGE_COLUMNS = ("prompt", "chosen", "rejected")
MAPPABLE = (*ROW_FIELDS, "response", "rating")  # the last two of ratings
POLIS_EXPORTS = (
    {"comment-id", "voter-id", "vote"},
    {"comment-id", "comment-body", "moderated"},
    {"participant", "group-id", "n-votes"},
)
"""Columns of the files that a Polis conversation is exported to."""

_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")


Plan = tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]


class ColumnMap:
    """Maps row fields to columns. A dotted column reaches into a value: ``chosen.-1.content``.

    Args:
        columns: row field -> column, for fields whose column has another name. ``response`` and
            ``rating``, of a file of ratings, may be mapped as well.

    Raises:
        ValueError: a field that rows do not have.
    """

    def __init__(self, columns: Mapping[str, str] | None) -> None:
        mapping = {} if columns is None else dict(columns)
        for name, column in mapping.items():
            if name not in MAPPABLE:
                cure = "Name the row field first, then the file's column"
                raise bad_value("data.columns", name, f"one of {', '.join(MAPPABLE)}", cure)
            if not isinstance(column, str):
                cure = "Name the column of the file that holds this field"
                raise bad_value(f"data.columns.{name}", column, "a column name", cure)
        self.mapped = frozenset(mapping.values())
        self.renamed = frozenset(mapping)
        self.column_of = {name: name for name in ROW_FIELDS} | mapping
        self.required = self.mapped | {self.column_of[name] for name in REQUIRED_FIELDS}
        self._used = frozenset(self.column_of.values())
        self._plans: dict[tuple[str, ...], Plan] = {}

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Rename the columns of a record to row fields. Columns without a field follow unchanged.

        Ids that are whole numbers become text. Since a table cell holds no objects, ``user_features``
        may be JSON text, and prompt and responses may be the text of a list of messages.
        """
        names = tuple(record)
        plan = self._plans.get(names)  # most records of a file have the same names
        if plan is None:
            plan = self._plans[names] = self._plan(names)
        whole, parts, others = plan
        row = {name: record[column] for name, column in whole}
        for name, column in parts:
            value = _reach(record, column)
            if value is not None:
                row[name] = value
        for name, value in row.items():
            if isinstance(value, bytes):
                row[name] = value = _decoded(value)
            if name in ID_FIELDS:
                row[name] = id_as_text(value)
            elif isinstance(value, str) and name in MESSAGE_COLUMNS:
                row[name] = messages_or_text(value)
        if isinstance(row.get("user_features"), str):
            row["user_features"] = json_or_text(row["user_features"])
        row.update({name: record[name] for name in others if name not in row})
        return row

    def _plan(self, names: tuple[str, ...]) -> Plan:
        """Plan how records with these columns are renamed.

        Returns:
            Pairs (field, column) of fields that are whole columns, pairs of fields that are parts of
            columns, and the columns that belong to no field.
        """
        present, heads = frozenset(names), self._heads(names)
        columns = self.column_of.items()
        whole = [(name, column) for name, column in columns if column in present]
        parts = [one for one in columns if one[1] not in present and "." in one[1]]
        return whole, parts, [name for name in names if name not in heads]

    def _heads(self, present: Collection[str]) -> set[str]:
        """Return the top-level columns that row fields are made from."""
        return {_head(column, present) for column in self._used}

    def used(self, present: Collection[str]) -> list[str]:
        """Return those of the present columns that row fields are made from."""
        heads = self._heads(present)
        return [column for column in present if column in heads]

    def check(self, wanted: Collection[str], present: Collection[str]) -> None:
        """Raise a ValueError for a wanted column that is missing, or for a column that is there twice.

        The prompt may be missing, since chosen and rejected may contain it.
        """
        twice = [name for name, n in Counter(present).items() if n > 1 and name.strip()]
        if len(twice) > 0:
            cure = "Rename or remove one of them"
            raise bad_value("column", twice[0], "a name that one column has", cure)
        for column in sorted(wanted):
            if _head(column, present) in present:
                continue
            if column == "prompt" and column not in self.mapped and may_lack_prompt(present):
                continue
            names = [name for name, at in self.column_of.items() if at == column]
            listed = ", ".join(sorted(present)) if len(present) > 0 else "none"
            cure = f"Map one with data.columns.{names[0]}=COLUMN; the file has {listed}"
            if len(present) > 0 and not {"chosen", "rejected"} & {*present}:
                cure += "; one of ratings needs response and rating instead"
            if any(export <= {*present} for export in POLIS_EXPORTS):
                cure = "Make rows of the export's folder: plrhf data convert polis DIR rows.jsonl"
            raise bad_value(f"data.columns.{names[0]}", column, "a column of the file", cure)


def _head(column: str, present: Collection[str]) -> str:
    """Return the top-level column of a dotted name. A column's own name may contain dots."""
    return column if column in present else column.partition(".")[0]


def _reach(record: Mapping[str, Any], column: str) -> Any:
    """Return the value at a dotted path of a record; None if the path does not exist."""
    if column in record or "." not in column:
        return record.get(column)
    value: Any = record
    for step in column.split("."):
        try:
            value = value[int(step)] if isinstance(value, (list, tuple)) else value[step]
        except (LookupError, TypeError, ValueError):
            return None
    return value


def _decoded(value: bytes) -> object:
    """Decode UTF-8 bytes. Other bytes are returned as they are, and `parse_row` refuses them."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def messages_or_text(text: str) -> object:
    """Parse a text that holds chat messages in JSON or Python syntax; return any other text as it is.

    A text that begins like messages but cannot be parsed becomes a list that `parse_row` refuses.
    """
    if not text.lstrip().startswith("[") or not _LIKE_MESSAGES.match(text):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [text]
    return value if is_message_list(value) else text


def json_or_text(text: str) -> object:
    """Parse JSON. Other text is returned as it is, and `parse_row` refuses it."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        return text
