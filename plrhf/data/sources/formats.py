"""Reads the records of a file in each format. A damaged line is reported, and reading goes on."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, AnyStr

from plrhf.core.errors import bad_value
from plrhf.data.parsing import LONGEST_LINE
from plrhf.data.reasons import Reason, Refusal
from plrhf.data.sources.json_list import list_items

Record = Mapping[str, Any] | Refusal
"""A record as a source reads it, or the reason why it is refused."""

DELIMITERS = ",\t;"
"""What may stand between the values of a CSV file; a comma, if the header has none of the others."""

PARQUET_ROWS = 64
"""Rows of a parquet file that are decoded at once: a few bytes of it can stand for many large values."""

LARGE_BATCH = 2**24
"""Bytes from which such rows are converted one by one."""

LONGEST_WHOLE = 64 * 2**20
"""Largest number of bytes of a file that is read whole, to say what it is."""

MOST_CSV_LINES = 5_000
"""Largest number of lines of one CSV record, since an unclosed quote would take the rest of the
file."""

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
OTHER_FORMATS = {
    b"PAR1": "a parquet file: name it .parquet",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
}
"""First bytes of files that are not text -> their format, and what to do."""


@contextmanager
def undamaged(path: str | Path) -> Iterator[None]:
    """Turn the errors of a damaged file into one clear line."""
    try:
        yield
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeError) as error:
        cure = f"Copy or write it again ({' '.join(str(error).split())})"
        raise bad_value("data.path", str(path), "a readable, undamaged file", cure) from error


def line_refusal(reason: Reason, value: object, allowed: str) -> Refusal:
    """Return the refusal of a line that cannot be read."""
    return Refusal(reason, str(bad_value("line", value, allowed, "Mend or remove the line")))


@contextmanager
def open_bytes(path: str | Path) -> Iterator[tuple[IO[bytes], str]]:
    """Open a text file, and find out its encoding. A gzip file is decompressed.

    The encoding follows from the byte order mark, or else from zero bytes among the first four, or
    else it is UTF-8.

    Raises:
        ValueError: the first bytes are those of another format.
    """
    with open(path, "rb") as raw:
        start = raw.read(8)
    for magic, kind in OTHER_FORMATS.items():
        if start.startswith(magic):
            cure = f"Give JSON lines or CSV (this is {kind})"
            raise bad_value("data.path", str(path), "a text file, plain or gzipped", cure)
    opener: Any = gzip.open if start.startswith(b"\x1f\x8b") else open
    with opener(path, "rb") as file:
        start = file.read(4)
        file.seek(0)
        encoding: str = json.detect_encoding(start) if len(start) > 1 else "utf-8"
        for mark, name in BYTE_ORDER_MARKS:
            if start.startswith(mark):
                encoding = name
                break
        yield file, encoding


def json_records(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Yield the objects of a file of JSON lines, or of one JSON list, numbered from 1.

    Raises:
        ValueError: the file is one JSON object over several lines.
    """
    start = _first_text(path)
    if start.startswith("[") and not _has_lists_in_lines(path):
        yield from enumerate(map(_object_or_refusal, _list_items(path)), 1)
        return
    if start.partition("\n")[0].strip() == "{" and (keys := _keys_of_whole(path)) is not None:
        cure = f"Write the list of records alone; the object has {', '.join(keys)}"
        raise bad_value("data.path", str(path), "records, not one object around them", cure)
    yield from json_lines(path)


def json_lines(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Yield the JSON object of each line, numbered from 1.

    Only a line feed ends a line, since JSON allows all other line separators inside a text.
    """
    with open_bytes(path) as (file, encoding):
        for number, line in enumerate(_byte_lines(file, encoding), 1):
            if line is None:
                allowed = f"at most {LONGEST_LINE:,} bytes"
                yield number, line_refusal(Reason.TOO_LARGE, "a longer line", allowed)
            elif line.strip():
                yield number, _json_object(line)


def _byte_lines(file: IO[bytes], encoding: str) -> Iterator[bytes | None]:
    """Yield lines as UTF-8 bytes, and None for a line that is too long to be a row."""
    if not encoding.startswith("utf-8"):
        for text in _lines(io.TextIOWrapper(file, encoding, newline="\n")):
            yield None if text is None else text.encode()
        return
    for number, line in enumerate(_lines(file)):
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 and line is not None else line


def _lines(file: IO[AnyStr]) -> Iterator[AnyStr | None]:
    """Yield the lines of a file, and None for each of more than `LONGEST_LINE`, never held whole."""
    while len(line := file.readline(LONGEST_LINE + 1)) > 0:
        if len(line) <= LONGEST_LINE:
            yield line
            continue
        end = "\n" if isinstance(line, str) else b"\n"
        while len(line) > LONGEST_LINE and line[-1:] != end:
            line = file.readline(LONGEST_LINE + 1)
        yield None


def _first_text(path: str | Path) -> str:
    """Return what a text file begins with, without white space in front."""
    with open_bytes(path) as (file, encoding):
        start = file.read(4096)
    return start.decode(encoding, errors="ignore").lstrip("\ufeff \t\r\n")


def _has_lists_in_lines(path: str | Path) -> bool:
    """Say whether a file that begins with a list has a JSON value on each line, and not one list in all."""
    with open_bytes(path) as (file, encoding):
        lines = (line for line in _byte_lines(file, encoding) if line is None or line.strip())
        first = next(lines)
        if first is None:
            return False
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return False
        return next(lines, b"") != b""


def _list_items(path: str | Path) -> Iterator[Any]:
    """Yield the values of a file that is one JSON list."""
    with open_bytes(path) as (file, encoding):
        text = io.TextIOWrapper(file, encoding)
        yield from list_items(text, object_hook=_object, longest=LONGEST_LINE)


def _keys_of_whole(path: str | Path) -> list[str] | None:
    """Return the keys of the one JSON object that a whole file is; None if it is none."""
    with open_bytes(path) as (file, encoding):
        whole = file.read(LONGEST_WHOLE + 1)
        if len(whole) > LONGEST_WHOLE:
            return None
        try:
            found = json.loads(whole.decode(encoding))
        except (ValueError, RecursionError):
            return None
    return list(found) if isinstance(found, dict) else None


def _object_or_refusal(value: Any) -> Record:
    """Return a JSON object as it is, and the refusal of any other JSON value."""
    return (
        value
        if isinstance(value, dict)
        else line_refusal(Reason.NOT_AN_OBJECT, value, "one object")
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the JSON object of these keys and values; raise if a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


_decode_json = json.JSONDecoder(object_pairs_hook=_object).decode


def _json_object(line: bytes) -> Record:
    """Parse a line as a JSON object, or return the reason why it is refused."""
    try:
        record = _decode_json(line.decode())
    except UnicodeDecodeError as error:
        allowed = f"UTF-8 text; {error.reason} at byte {error.start}"
        return line_refusal(Reason.BAD_UTF8, line, allowed)
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of 4,300 digits
        cause = str(error)
        if isinstance(error, json.JSONDecodeError):  # its text speaks of line 1 of this line
            cause = f"{error.msg} at column {error.colno}"
        return line_refusal(Reason.BAD_JSON, line.decode(), f"one JSON object; {cause}")
    if not isinstance(record, dict):
        return line_refusal(Reason.NOT_AN_OBJECT, record, "one JSON object")
    return record


def csv_header(path: str | Path) -> list[str]:
    """Return the column names of a CSV file."""
    csv.field_size_limit(LONGEST_LINE)  # the module's own, 131,072, is a long chat history
    with open_bytes(path) as (file, encoding):
        lines = _Lines(io.TextIOWrapper(file, encoding, errors="surrogateescape", newline=""))
        header = lines.record()
    if isinstance(header, csv.Error):
        raise header
    return header


def csv_rows(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Yield the rows of a CSV file, each with the number of its first line.

    After a row that cannot be read, reading goes on at the very next line. A stray quote may have
    made one field of many rows, which would otherwise be lost.
    """
    csv.field_size_limit(LONGEST_LINE)
    with open_bytes(path) as (file, encoding):
        # Undecodable bytes come through as surrogates, which `parse_row` refuses row by row.
        errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        lines = _Lines(io.TextIOWrapper(file, encoding, errors=errors, newline=""))
        header = lines.record()
        assert isinstance(header, list)  # `csv_header` has refused another
        lines.accept()
        while lines.more():
            number, values = lines.number, lines.record()
            if isinstance(values, list) and len(values) == len(header):
                lines.accept()
                yield number, dict(zip(header, values, strict=True))
                continue
            lines.skip_line()
            if isinstance(values, _TooLarge):
                yield number, line_refusal(Reason.TOO_LARGE, "a longer row", str(values))
            elif isinstance(values, csv.Error):
                yield number, line_refusal(Reason.BAD_CSV, str(values), "one whole CSV row")
            elif len(values) > 0:
                allowed = f"{len(header)} values, as in the header, not {len(values)}"
                yield number, line_refusal(Reason.BAD_CSV, ",".join(values), allowed)


class _TooLarge(csv.Error):
    """Raised for a line that is too long to be a row."""


class _Lines:
    """The lines of a CSV file, for reading a record tentatively.

    After `record` has parsed a record, `accept` moves behind it, or `skip_line` moves on by one line.

    Attributes:
        number: number of the next line, from 1.
        delimiter: what stands between values: of `DELIMITERS` the one that the first line has most of.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file, self._ahead = _lines(file), deque[str | None]()
        self.number, self._taken = 1, 0
        first = (self._ahead[0] if self.more() else None) or ""
        self.delimiter = max(DELIMITERS, key=first.count)

    def more(self) -> bool:
        """Whether there is another line."""
        if len(self._ahead) == 0:
            self._ahead.extend(islice(self._file, 1))
        return len(self._ahead) > 0

    def record(self) -> list[str] | csv.Error:
        """Parse the record that begins at the next line, or return the parser's error."""
        reader = csv.reader(self._look_ahead(), delimiter=self.delimiter, strict=True)
        try:
            values = next(reader, [])
        except csv.Error as error:
            return error
        self._taken = reader.line_num
        return values

    def accept(self) -> None:
        """Move behind the record that was parsed last."""
        for _ in range(self._taken):
            self._ahead.popleft()
        self.number += self._taken

    def skip_line(self) -> None:
        """Move on by one line."""
        self._ahead.popleft()
        self.number += 1

    def _look_ahead(self) -> Iterator[str]:
        """Yield the next lines without moving, at most `MOST_CSV_LINES` and twice `LONGEST_LINE`.

        Raises:
            _TooLarge: the first line is too long by itself.
        """
        size = 0
        for place in range(MOST_CSV_LINES):
            if place == len(self._ahead):
                self._ahead.extend(islice(self._file, 1))
            if place == len(self._ahead):
                return
            line = self._ahead[place]
            if line is None and place == 0:
                raise _TooLarge(f"at most {LONGEST_LINE:,} characters")
            size += LONGEST_LINE if line is None else len(line)
            if line is None or size > 2 * LONGEST_LINE:
                return
            yield line


def parquet_names(path: str | Path) -> list[str]:
    """Return the names of a parquet file's columns."""
    from pyarrow.parquet import ParquetFile  # here, since only parquet files need it

    with _arrow_errors(), ParquetFile(path) as file:
        return list(file.schema_arrow.names)


def parquet_rows(
    path: str | Path, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, Record]]:
    """Yield the rows of a parquet file, numbered from 1, with these columns or all."""
    from pyarrow.parquet import ParquetFile

    # With its buffer, all that has been read would stay in memory to the end.
    with _arrow_errors(), ParquetFile(path, pre_buffer=False) as file:
        batches = file.iter_batches(batch_size=PARQUET_ROWS, columns=columns)
        parts = (part for batch in batches for part in _small_parts(batch))
        yield from enumerate((row for part in parts for row in _batch_records(part)), 1)


def _small_parts(batch: Any) -> Iterator[Any]:
    """Yield the rows of a record batch together, or one after the other where they are large."""
    step = max(1, batch.num_rows) if batch.nbytes < LARGE_BATCH else 1
    yield from (batch.slice(start, step) for start in range(0, batch.num_rows, step))


@contextmanager
def _arrow_errors() -> Iterator[None]:
    """Turn the errors of Arrow and of undecodable column names into an `OSError`."""
    import pyarrow as arrow

    try:
        yield
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise OSError(error) from error


def _batch_records(batch: Any) -> list[Record]:
    """Convert a record batch to rows. A row with a value that Python cannot hold is refused."""
    import pyarrow as arrow

    try:
        found: list[Record] = batch.to_pylist(maps_as_pydicts="strict")
        return found
    except (ValueError, OverflowError, KeyError, arrow.ArrowException) as error:
        if batch.num_rows == 1:
            if isinstance(error, UnicodeDecodeError):
                return [line_refusal(Reason.BAD_UTF8, error.object[:80], "UTF-8 text")]
            cause = " ".join(str(error).split())
            return [line_refusal(Reason.BAD_PARQUET, cause, "values that Python can hold")]
        halves = [batch.slice(0, batch.num_rows // 2), batch.slice(batch.num_rows // 2)]
        return [record for half in halves for record in _batch_records(half)]
