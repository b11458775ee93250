"""Rows from one file: .jsonl, .jsonl.gz, .parquet or .csv, by the file's ending."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from plrhf.data.rows import ID_FIELDS, REQUIRED_FIELDS, ROW_FIELDS, Reason, Refusal
from plrhf.data.sources.base import Source, id_as_text
from plrhf.errors import bad_value

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".csv")
LONGEST_CSV_FIELD = 2**31 - 1  # the csv module's own limit, 131,072, is a long chat history


class JsonlSource(Source):
    """Preference rows of a file, streamed; what cannot be decoded is reported and reading goes on.

    Whole-number ids become text, and ``user_features`` may be JSON text (tables have no objects).

    Args:
        path: the file; its ending says how it is read.
        columns: row field -> column of the file, for fields whose column has another name.

    Raises:
        ValueError: unknown ending, or a field in `columns` that rows do not have.
    """

    def __init__(self, *, path: str, columns: Mapping[str, str] | None = None) -> None:
        if not path.lower().endswith(ENDINGS):
            cure = f"Convert the file to one of {', '.join(ENDINGS)}"
            raise bad_value("data.path", path, f"a file ending in {' '.join(ENDINGS)}", cure)
        mapping = {} if columns is None else dict(columns)
        for name, column in mapping.items():
            if name not in ROW_FIELDS:
                cure = "Name the row field first, then the file's column"
                raise bad_value("data.columns", name, f"one of {', '.join(ROW_FIELDS)}", cure)
            if not isinstance(column, str):
                cure = "Name the column of the file that holds this field"
                raise bad_value(f"data.columns.{name}", column, "a column name", cure)
        self.path = path
        self.mapped = frozenset(mapping.values())
        self.column_of = {name: mapping.get(name, name) for name in ROW_FIELDS}

    def records(self) -> Iterator[tuple[str, Mapping[str, Any] | Refusal]]:
        """Yield records under row field names, placed by line (parquet: row) number from 1.

        Raises:
            ValueError: the file is missing or damaged, or lacks a column it must have.
        """
        if not Path(self.path).is_file():
            cure = "Check the spelling and the directory you start from"
            raise bad_value("data.path", self.path, "an existing file", cure)
        ending = self.path.lower()
        read = self._json_lines
        if ending.endswith(".parquet"):
            read = self._parquet
        elif ending.endswith(".csv"):
            read = self._csv
        try:
            for number, record in read():
                row = record if isinstance(record, Refusal) else self._renamed(record)
                yield f"{self.path}:{number}", row
        except (OSError, EOFError, zlib.error, csv.Error) as error:
            cure = f"Copy or write it again ({' '.join(str(error).split())})"
            raise bad_value("data.path", self.path, "a readable, undamaged file", cure) from error

    def _renamed(self, record: Mapping[str, Any]) -> dict[str, Any]:
        row = {name: record[at] for name, at in self.column_of.items() if at in record}
        for name in ID_FIELDS:
            if name in row:
                row[name] = id_as_text(row[name])
        if isinstance(row.get("user_features"), str):
            row["user_features"] = _json_or_text(row["user_features"])
        return row

    def _json_lines(self) -> Iterator[tuple[int, Mapping[str, Any] | Refusal]]:
        seen: set[str] = set()
        compressed = self.path.lower().endswith(".gz")
        with gzip.open(self.path) if compressed else open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                record = _json_object(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                if not isinstance(record, Refusal):
                    seen.update(record)
                yield number, record
        if len(seen) > 0:  # any line may lack a column, so only now
            self._check_columns(self.mapped, seen)

    def _csv(self) -> Iterator[tuple[int, Mapping[str, Any] | Refusal]]:
        csv.field_size_limit(LONGEST_CSV_FIELD)
        # Undecodable bytes come through as surrogates, which `parse_row` refuses row by row.
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)  # otherwise an open quote swallows rows
            header = next(reader, [])
            self._check_columns({*self.mapped, *self._required()}, header)
            while True:
                number = reader.line_num + 1
                try:
                    values = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield number, _refusal(Reason.BAD_CSV, str(error), "one whole CSV row")
                    continue
                if len(values) == len(header):
                    yield number, dict(zip(header, values, strict=True))
                elif len(values) > 0:
                    allowed = f"{len(header)} values, as in the header, not {len(values)}"
                    yield number, _refusal(Reason.BAD_CSV, ",".join(values), allowed)

    def _parquet(self) -> Iterator[tuple[int, Mapping[str, Any] | Refusal]]:
        import pyarrow as arrow  # here, since only parquet files need it
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(self.path) as file:
                names = file.schema_arrow.names
                self._check_columns({*self.mapped, *self._required()}, names)
                used = [name for name in names if name in self.column_of.values()]
                batches = file.iter_batches(batch_size=4096, columns=used)
                records = (record for batch in batches for record in _batch_records(batch))
                yield from enumerate(records, 1)
        except arrow.ArrowException as error:
            raise OSError(error) from error

    def _required(self) -> set[str]:
        return {self.column_of[name] for name in REQUIRED_FIELDS}

    def _check_columns(self, wanted: Iterable[str], present: Collection[str]) -> None:
        for column in sorted(set(wanted).difference(present)):
            names = [name for name, at in self.column_of.items() if at == column]
            listed = ", ".join(sorted(present))
            cure = f"Map one with data.columns.{names[0]}=COLUMN; the file has {listed}"
            raise bad_value(f"data.columns.{names[0]}", column, "a column of the file", cure)


def _batch_records(batch: Any) -> Iterator[Mapping[str, Any] | Refusal]:
    """Yield a record batch's rows, one by one where some text in it is not UTF-8."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield _refusal(Reason.BAD_UTF8, error.object[:80], "UTF-8 text")
            return
        for place in range(batch.num_rows):
            yield from _batch_records(batch.slice(place, 1))


def _json_object(line: bytes) -> Mapping[str, Any] | Refusal:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _refusal(Reason.BAD_UTF8, line, f"UTF-8 text; {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of 4,300 digits
        cause = str(error)
        if isinstance(error, json.JSONDecodeError):  # its text speaks of line 1 of this line
            cause = f"{error.msg} at column {error.colno}"
        return _refusal(Reason.BAD_JSON, line.decode(), f"one JSON object; {cause}")
    if not isinstance(record, dict):
        return _refusal(Reason.NOT_AN_OBJECT, record, "one JSON object")
    return record


def _json_or_text(text: str) -> object:
    """Return the JSON value, or the text itself for `parse_row` to refuse in its own words."""
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        return text


def _refusal(reason: Reason, value: object, allowed: str) -> Refusal:
    return Refusal(reason, str(bad_value("line", value, allowed, "Mend or remove the line")))
