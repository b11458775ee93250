"""Rows from one file: .jsonl, .jsonl.gz, .json, .parquet or .csv, by the file's ending."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from plrhf.core.errors import bad_value
from plrhf.data.reasons import Refusal
from plrhf.data.sources.base import Source
from plrhf.data.sources.columns import ColumnMap
from plrhf.data.sources.formats import (
    Record,
    csv_header,
    csv_rows,
    json_records,
    parquet_names,
    parquet_rows,
    undamaged,
)

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")


class JsonlSource(Source):
    """Streams the preference rows of a file. Lines that cannot be decoded are refused one by one.

    Args:
        path: the file; its ending decides how it is read.
        columns: row field -> column of the file, see `ColumnMap`.
        keep_split: whether rows keep the split that the file gives them; else they are divided by prompt.

    Raises:
        ValueError: unknown ending, or a field in `columns` that rows do not have.
    """

    def __init__(
        self, *, path: str, columns: Mapping[str, str] | None = None, keep_split: bool = True
    ) -> None:
        if not path.lower().endswith(ENDINGS):
            cure = f"Convert the file to one of {', '.join(ENDINGS)}"
            raise bad_value("data.path", path, f"a file ending in {' '.join(ENDINGS)}", cure)
        self.path, self.keep_split = path, keep_split
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
        read = self._json
        if ending.endswith(".parquet"):
            read = self._parquet
        elif ending.endswith(".csv"):
            read = self._csv
        with undamaged(self.path):
            for number, record in read():
                row = record if isinstance(record, Refusal) else self.columns.row(record)
                if not (self.keep_split or isinstance(row, Refusal)):
                    row.pop("split", None)
                yield f"{self.path}:{number}", row

    def _json(self) -> Iterator[tuple[int, Record]]:
        """Yield the records of a JSON file; at its end, check that the mapped columns were there."""
        seen: set[str] = set()
        for number, record in json_records(self.path):
            if not isinstance(record, Refusal):
                seen.update(record)
            yield number, record
        if len(seen) > 0:  # any line may lack a column, so only now
            self.columns.check(self.columns.mapped, seen)

    def _parquet(self) -> Iterator[tuple[int, Record]]:
        names = parquet_names(self.path)
        self.columns.check(self.columns.required, names)
        used = self.columns.used(names)
        # Their values are not needed, only that rows have them.
        unread = dict.fromkeys(name for name in names if name not in used)
        for number, record in parquet_rows(self.path, used):
            yield number, record if isinstance(record, Refusal) else {**record, **unread}

    def _csv(self) -> Iterator[tuple[int, Record]]:
        self.columns.check(self.columns.required, csv_header(self.path))
        return csv_rows(self.path)
