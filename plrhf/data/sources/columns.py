"""Row fields under the names that somebody else's table gives them."""

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
_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")


Plan = tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]


class ColumnMap:
    """Row field -> column; a dotted one reaches into it: ``info.post``, ``chosen.-1.content``.

    Args:
        columns: for fields whose column has another name.

    Raises:
        ValueError: a field that rows do not have.
    """

    def __init__(self, columns: Mapping[str, str] | None) -> None:
        mapping = {} if columns is None else dict(columns)
        for name, column in mapping.items():
            if name not in ROW_FIELDS:
                cure = "Name the row field first, then the file's column"
                raise bad_value("data.columns", name, f"one of {', '.join(ROW_FIELDS)}", cure)
            if not isinstance(column, str):
                cure = "Name the column of the file that holds this field"
                raise bad_value(f"data.columns.{name}", column, "a column name", cure)
        self.mapped = frozenset(mapping.values())
        self.column_of = {name: mapping.get(name, name) for name in ROW_FIELDS}
        self.required = self.mapped | {self.column_of[name] for name in REQUIRED_FIELDS}
        self._used = frozenset(self.column_of.values())
        self._plans: dict[tuple[str, ...], Plan] = {}

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record under row field names, with what no row field is made from behind.

        Whole-number ids become text. As tables have no objects, ``user_features`` may be JSON text
        and prompt and responses the text of a list of messages.
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
            row["user_features"] = _json_or_text(row["user_features"])
        row.update({name: record[name] for name in others if name not in row})
        return row

    def _plan(self, names: tuple[str, ...]) -> Plan:
        """Return, for records of these names, fields that are whole columns, fields that are parts
        of columns, and the names that no field is made from."""
        present, heads = frozenset(names), self._heads(names)
        columns = self.column_of.items()
        whole = [(name, column) for name, column in columns if column in present]
        parts = [one for one in columns if one[1] not in present and "." in one[1]]
        return whole, parts, [name for name in names if name not in heads]

    def _heads(self, present: Collection[str]) -> set[str]:
        return {_head(column, present) for column in self._used}

    def used(self, present: Collection[str]) -> list[str]:
        """Return the columns among those present that rows are made from."""
        heads = self._heads(present)
        return [column for column in present if column in heads]

    def check(self, wanted: Collection[str], present: Collection[str]) -> None:
        """Raise a ValueError for the first wanted column that is not present, or for one that is
        there twice. A prompt may be absent where chosen and rejected hold it too."""
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
            listed = ", ".join(sorted(present))
            cure = f"Map one with data.columns.{names[0]}=COLUMN; the file has {listed}"
            raise bad_value(f"data.columns.{names[0]}", column, "a column of the file", cure)


def _head(column: str, present: Collection[str]) -> str:
    """Return the top-level column that a name speaks of; a whole name may hold dots itself."""
    return column if column in present else column.partition(".")[0]


def _reach(record: Mapping[str, Any], column: str) -> Any:
    """Return the value at a column's path, None where the path ends early."""
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
    """Return the text of bytes, or the bytes for `parse_row` to refuse."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def messages_or_text(text: str) -> object:
    """Return the messages that a text spells in JSON or as Python prints them, or else the text.

    A text that begins like messages and cannot be read becomes a list that `parse_row` refuses.
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


def _json_or_text(text: str) -> object:
    """Return the JSON value, or the text itself for `parse_row` to refuse in its own words."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        return text
