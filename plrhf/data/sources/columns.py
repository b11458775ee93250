"""Row fields under the names that somebody else's table gives them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from plrhf.core.errors import bad_value
from plrhf.data.rows import ID_FIELDS, REQUIRED_FIELDS, ROW_FIELDS
from plrhf.data.sources.base import id_as_text


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

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record under row field names: whole-number ids become text, and
        ``user_features`` may be JSON text (tables have no objects)."""
        found = {name: _reach(record, column) for name, column in self.column_of.items()}
        row = {name: value for name, value in found.items() if value is not None}
        for name in ID_FIELDS:
            if name in row:
                row[name] = id_as_text(row[name])
        if isinstance(row.get("user_features"), str):
            row["user_features"] = _json_or_text(row["user_features"])
        return row

    def used(self, present: Collection[str]) -> list[str]:
        """Return the columns among those present that rows are made from."""
        heads = {_head(column, present) for column in self.column_of.values()}
        return [column for column in present if column in heads]

    def check(self, wanted: Collection[str], present: Collection[str]) -> None:
        """Raise a ValueError for the first wanted column that is not present."""
        for column in sorted(wanted):
            if _head(column, present) in present:
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


def _json_or_text(text: str) -> object:
    """Return the JSON value, or the text itself for `parse_row` to refuse in its own words."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        return text
