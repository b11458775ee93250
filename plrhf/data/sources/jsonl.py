"""Rows from one file: .jsonl, .jsonl.gz, .parquet or .csv, by the file's ending."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from plrhf.core.errors import bad_value
from plrhf.data.reasons import Reason, Refusal
from plrhf.data.sources.base import Source
from plrhf.data.sources.columns import ColumnMap
from plrhf.data.sources.files import (
    Record,
    json_lines,
    line_refusal,
    parquet_names,
    parquet_rows,
    undamaged,
)

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".csv")
LONGEST_CSV_FIELD = 2**31 - 1  # the csv module's own limit, 131,072, is a long chat history


class JsonlSource(Source):
    """Preference rows of a file, streamed; what cannot be decoded is reported and reading goes on.

    Args:
        path: the file; its ending says how it is read.
        columns: row field -> column of the file, see `ColumnMap`.

    Raises:
        ValueError: unknown ending, or a field in `columns` that rows do not have.
    """

    def __init__(self, *, path: str, columns: Mapping[str, str] | None = None) -> None:
        if not path.lower().endswith(ENDINGS):
            cure = f"Convert the file to one of {', '.join(ENDINGS)}"
            raise bad_value("data.path", path, f"a file ending in {' '.join(ENDINGS)}", cure)
        self.path = path
        self.columns = ColumnMap(columns)

    def records(self) -> Iterator[tuple[str, Record]]:
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
        with undamaged(self.path):
            for number, record in read():
                row = record if isinstance(record, Refusal) else self.columns.row(record)
                yield f"{self.path}:{number}", row

    def _json_lines(self) -> Iterator[tuple[int, Record]]:
        seen: set[str] = set()
        for number, record in json_lines(self.path):
            if not isinstance(record, Refusal):
                seen.update(record)
            yield number, record
        if len(seen) > 0:  # any line may lack a column, so only now
            self.columns.check(self.columns.mapped, seen)

    def _parquet(self) -> Iterator[tuple[int, Record]]:
        names = parquet_names(self.path)
        self.columns.check(self.columns.required, names)
        yield from parquet_rows(self.path, self.columns.used(names))

    def _csv(self) -> Iterator[tuple[int, Record]]:
        csv.field_size_limit(LONGEST_CSV_FIELD)
        # Undecodable bytes come through as surrogates, which `parse_row` refuses row by row.
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)  # otherwise an open quote swallows rows
            header = next(reader, [])
            self.columns.check(self.columns.required, header)
            while True:
                number = reader.line_num + 1
                try:
                    values = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield number, line_refusal(Reason.BAD_CSV, str(error), "one whole CSV row")
                    continue
                if len(values) == len(header):
                    yield number, dict(zip(header, values, strict=True))
                elif len(values) > 0:
                    allowed = f"{len(header)} values, as in the header, not {len(values)}"
                    yield number, line_refusal(Reason.BAD_CSV, ",".join(values), allowed)
