"""Records of data files, whatever their format; what cannot be decoded is reported and reading goes on."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plrhf.core.errors import bad_value
from plrhf.data.reasons import Reason, Refusal

Record = Mapping[str, Any] | Refusal
"""What a source finds at one place of a file."""

ENDINGS = (".json", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class HubFiles:
    """Which files of a hub repository hold a dataset.

    Args:
        name: repository, e.g. ``openai/summarize_from_feedback``.
        patterns: of the files wanted, e.g. ``survey.jsonl``, ``comparisons/*``.
        revision: branch or commit; None: the main branch.
    """

    name: str
    patterns: tuple[str, ...]
    revision: str | None = None

    def download(self) -> Path:
        """Return the directory that holds the files, fetched once and then kept by the hub's client.

        Raises:
            ValueError: they cannot be had.
        """
        from huggingface_hub import snapshot_download  # here, since local copies need no network

        try:
            directory = snapshot_download(
                self.name,
                repo_type="dataset",
                revision=self.revision,
                allow_patterns=list(self.patterns),
            )
        except (OSError, ValueError) as error:
            cure = f"Set data.path to a local copy ({' '.join(str(error).split())})"
            raise bad_value("data.path", self.name, "a dataset the hub hands out", cure) from error
        return Path(directory)


def data_files(
    path: str | Sequence[str], *, hub: HubFiles | None = None, within: str | None = None
) -> list[Path]:
    """Return the data files that `data.path` stands for: of the hub, of directories, or themselves.

    Args:
        path: a directory (all files below it, by name), a file, a list of these, or `hub`'s name.
        within: a folder that the files lie in, where a directory has it.

    Raises:
        ValueError: nothing is there, or no file of `ENDINGS`.
    """
    places = [path] if isinstance(path, str) else list(path)
    files: list[Path] = []
    for place in places:
        root = Path(place)
        if hub is not None and place == hub.name and not root.exists():
            root = hub.download()
        if root.is_dir():
            folder = root / within if within is not None and (root / within).is_dir() else root
            files += sorted(one for one in folder.rglob("*") if is_data(one) and one.is_file())
        elif root.is_file() and is_data(root):
            files.append(root)
        else:
            allowed = f"a directory or file ({', '.join(ENDINGS)})"
            allowed += "" if hub is None else f", or {hub.name} of the hub"
            cure = "Check the spelling and the directory you start from"
            raise bad_value("data.path", place, allowed, cure)
    if len(files) == 0:
        cure = "Check that it is the directory of the dataset's files"
        raise bad_value("data.path", path, f"files ending in {' '.join(ENDINGS)}", cure)
    return files


def is_data(path: Path) -> bool:
    """Whether the ending is one that `read_files` reads."""
    return path.name.lower().endswith(ENDINGS)


def read_files(paths: Iterable[Path]) -> Iterator[tuple[str, Record]]:
    """Yield each record with its place, ``file:line`` (of a JSON list or parquet: ``file:row``).

    Raises:
        ValueError: a file is damaged.
    """
    for path in paths:
        read: Callable[[Path], Iterator[tuple[int, Record]]] = json_lines
        if path.name.lower().endswith(".parquet"):
            read = parquet_rows
        elif path.name.lower().endswith(".json") and _holds_a_list(path):
            read = json_list
        with undamaged(path):
            for number, record in read(path):
                yield f"{path}:{number}", record


@contextmanager
def undamaged(path: str | Path) -> Iterator[None]:
    """Turn what a broken file raises into one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        cure = f"Copy or write it again ({' '.join(str(error).split())})"
        raise bad_value("data.path", str(path), "a readable, undamaged file", cure) from error


def json_lines(path: str | Path) -> Iterator[tuple[int, Record]]:
    """Yield the object of each line of a .jsonl or .jsonl.gz file, numbered from 1."""
    compressed = str(path).lower().endswith(".gz")
    with gzip.open(path) if compressed else open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                start = b"\xef\xbb\xbf" if number == 1 else b""
                yield number, _json_object(line.removeprefix(start))


def json_list(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield the objects of a file that is one JSON list, numbered from 1."""
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise OSError(f"not a JSON list: {error}") from error
    for number, record in enumerate(records, 1):
        good = isinstance(record, dict)
        yield number, record if good else line_refusal(Reason.NOT_AN_OBJECT, record, "one object")


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
        batches = file.iter_batches(batch_size=4096, columns=columns)
        yield from enumerate((row for batch in batches for row in _batch_records(batch)), 1)


def line_refusal(reason: Reason, value: object, allowed: str) -> Refusal:
    """Return the refusal of a line that cannot be decoded."""
    return Refusal(reason, str(bad_value("line", value, allowed, "Mend or remove the line")))


@contextmanager
def _arrow_errors() -> Iterator[None]:
    import pyarrow as arrow

    try:
        yield
    except arrow.ArrowException as error:
        raise OSError(error) from error


def _holds_a_list(path: Path) -> bool:
    """Whether a .json file is one list; otherwise it holds JSON lines, as OpenAI's do."""
    with undamaged(path), path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _batch_records(batch: Any) -> Iterator[Record]:
    """Yield a record batch's rows, one by one where some text in it is not UTF-8."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield line_refusal(Reason.BAD_UTF8, error.object[:80], "UTF-8 text")
            return
        for place in range(batch.num_rows):
            yield from _batch_records(batch.slice(place, 1))


def _json_object(line: bytes) -> Record:
    try:
        record = json.loads(line.decode())
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
