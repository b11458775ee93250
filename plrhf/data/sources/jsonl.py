"""Rows from one file of `ENDINGS`, by the file's ending.

Records need not be rows: see `forms` for comparisons, ratings and exports of annotation tools.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from plrhf.core.errors import bad_value
from plrhf.data.reasons import Refusal
from plrhf.data.sources import ratings
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
from plrhf.data.sources.forms import form_of

TABLES = (".csv", ".csv.gz", ".tsv")
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", *TABLES)


class JsonlSource(Source):
    """Streams the preference rows of a file. Lines that cannot be decoded are refused one by one.

    Args:
        path: the file; its ending decides how it is read.
        columns: row field -> column of the file, see `ColumnMap`.
        keep_split: whether rows keep the split that the file gives them; else they are divided by prompt.
        rating_scale: lowest and highest of a file of ratings, which then are rows of their own beside
            their pairs, see `ratings.rows`; None: pairs alone.

    Raises:
        ValueError: unknown ending, or a field in `columns` that rows do not have.
    """

    def __init__(
        self,
        *,
        path: str,
        columns: Mapping[str, str] | None = None,
        keep_split: bool = True,
        rating_scale: list[int] | None = None,
    ) -> None:
        if not path.lower().endswith(ENDINGS):
            if Path(path).is_dir():
                cure = "Name a file in it. A Polis export: plrhf data convert polis DIR rows.jsonl"
                raise bad_value("data.path", path, "a file, not a folder", cure)
            cure = f"Convert the file to one of {', '.join(ENDINGS)}"
            raise bad_value("data.path", path, f"a file ending in {' '.join(ENDINGS)}", cure)
        self.path, self.keep_split = path, keep_split
        self.columns = ColumnMap(columns)
        self.rating_scale = rating_scale

    def records(self) -> Iterator[tuple[str, Record]]:
        """Yield records under row field names, placed by line (parquet: row) number from 1.

        Raises:
            ValueError: the file is missing or damaged, or lacks a column it must have.
        """
        if not Path(self.path).is_file():
            cure = "Check the spelling and the directory you start from"
            raise bad_value("data.path", self.path, "an existing file", cure)
        ending = self.path.lower()
        with undamaged(self.path):
            if ending.endswith(".parquet"):
                names = parquet_names(self.path)
            elif ending.endswith(TABLES):
                names = csv_header(self.path)
            else:
                names, records = _peek(json_records(self.path))
            form = form_of({*self.columns.row(dict.fromkeys(names)), *self.columns.renamed})
            self.form = None if form is None else form.name
            to_rows = None if form is None else form.rows
            if self.rating_scale is not None:
                if self.form != "ratings":
                    allowed, cure = "null unless the file is one of ratings", "Set it to null"
                    raise bad_value("model.rating_scale", self.rating_scale, allowed, cure)
                to_rows = partial(ratings.rows, scale=self.rating_scale)
            if ending.endswith(".parquet"):
                records = self._parquet(names)
            elif ending.endswith(TABLES):
                records = self._csv(names)
            else:
                records = self._json(records)
            found = self._renamed(records)
            for number, row in found if to_rows is None else to_rows(found):
                yield f"{self.path}:{number}", row

    def _renamed(self, records: Iterator[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
        """Yield the records with the names of row fields for mapped columns."""
        for number, record in records:
            row = record if isinstance(record, Refusal) else self.columns.row(record)
            if not (self.keep_split or isinstance(row, Refusal)):
                row.pop("split", None)
            yield number, row

    def _json(self, records: Iterator[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
        """Yield the records; at their end, check that the mapped columns were there."""
        seen: set[str] = set()
        for number, record in records:
            if not isinstance(record, Refusal):
                seen.update(record)
            yield number, record
        if len(seen) > 0:  # any line may lack a column, so only now
            self.columns.check(self.columns.mapped, seen)

    def _parquet(self, names: Sequence[str]) -> Iterator[tuple[int, Record]]:
        if self.form is not None:
            return parquet_rows(self.path, list(names))
        self.columns.check(self.columns.required, names)
        used = self.columns.used(names)
        # The others' values are not needed, only that rows have them.
        unread = dict.fromkeys(name for name in names if name not in used)
        return (
            (number, record if isinstance(record, Refusal) else {**record, **unread})
            for number, record in parquet_rows(self.path, used)
        )

    def _csv(self, names: Sequence[str]) -> Iterator[tuple[int, Record]]:
        wanted = self.columns.required if self.form is None else self.columns.mapped
        self.columns.check(wanted, names)
        return csv_rows(self.path)


def _peek(
    records: Iterator[tuple[int, Record]],
) -> tuple[list[str], Iterator[tuple[int, Record]]]:
    """Return the keys of the first record that is not refused, and all records."""
    before = []
    for number, record in records:
        before.append((number, record))
        if not isinstance(record, Refusal):
            return list(record), chain(before, records)
    return [], iter(before)
