"""What a comparison has found so far, on disk: a job that is there is not done again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import Field

from plrhf.core.errors import bad_value
from plrhf.core.files import whole_file
from plrhf.data.digests import file_digest
from plrhf.evaluation.records import Record, read_record, write_record

JOB, MARGINS_FILE = "job.json", "margins.parquet"


class JobRecord(Record):
    """job.json, schema 2: a method on some rows with one seed.

    Attributes:
        rows, method, seed: what was done. features: what stood for a text.
        fingerprint: hash of all that decides the result.
        world: what people of other seeds must share to be the same people.
        halvings: shares of the steps after which the worse half of the trials stopped.
        trials: each with ``point``, ``val_loss``, ``val_accuracy``, ``step``, ``n_steps``.
        best: the trial chosen.
        vmapped: whether trials were trained in one call.
        seconds: CPU time of training all trials. seconds_per_user: of a new user's fit.
        numbers_per_user: learned numbers that belong to one user alone.
        facts: of the rows, the same for all methods.
        files: digest of the margins by the name of their file; empty in older records.
    """

    version: Literal[2] = Field(default=2, alias="schema")
    rows: str
    method: str
    features: str
    seed: int
    fingerprint: str
    halvings: list[float]
    world: str | None
    personal: bool
    trials: list[dict[str, Any]]
    best: int
    vmapped: bool
    seconds: float
    seconds_per_user: float
    numbers_per_user: int
    facts: dict[str, Any] = {}
    files: dict[str, str] = {}


class Store:
    """A folder of finished jobs.

    Args:
        folder: made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "jobs"
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, rows: str, method: str, seed: int) -> Path:
        """Return the folder of a job."""
        return self.folder / rows.replace("/", "-") / method / str(seed)

    def has(self, rows: str, method: str, seed: int, fingerprint: str) -> bool:
        """Say whether a job was done with the same settings on the same rows, and left whole margins."""
        path = self.path(rows, method, seed) / JOB
        if not path.is_file():
            return False
        record = read_record(path, JobRecord)
        return record.fingerprint == fingerprint and _is_whole(path.parent / MARGINS_FILE, record)

    def write(self, record: JobRecord, margins: pd.DataFrame) -> None:
        """Keep a job's record and its margins on test pairs; a killed one leaves no record."""
        path = self.path(record.rows, record.method, record.seed)
        path.mkdir(parents=True, exist_ok=True)
        (path / JOB).unlink(missing_ok=True)
        _write(path, record, margins)

    def rows(self) -> list[str]:
        """Return the folders of rows that have finished jobs, sorted."""
        return sorted({path.parts[-4] for path in self.folder.glob(f"*/*/*/{JOB}")})

    def jobs(self, rows: str = "*") -> Iterator[tuple[JobRecord, pd.DataFrame]]:
        """Yield the finished jobs of a folder of rows, or of all, with their margins."""
        for path in sorted(self.folder.glob(f"{rows}/*/*/{JOB}")):
            record = read_record(path, JobRecord)
            yield record, _margins(path.parent / MARGINS_FILE, record)

    def forget(self, user: str) -> Iterator[tuple[Path, int]]:
        """Remove a person from the margins of all jobs; yield each such file and how many there were."""
        for path in sorted(self.folder.glob(f"*/*/*/{MARGINS_FILE}")):
            job = path.parent / JOB
            if not job.is_file():  # of a job that was killed, and is done again
                path.unlink()
                continue
            record = read_record(job, JobRecord)
            margins = _margins(path, record)
            kept = margins[margins["user_id"] != user]
            if len(kept) < len(margins):
                _write(path.parent, record, kept)
                yield path, len(margins) - len(kept)


def _write(folder: Path, record: JobRecord, margins: pd.DataFrame) -> None:
    """Write the margins of a job, and its record with their digest."""
    with whole_file(folder / MARGINS_FILE) as part:
        margins.to_parquet(part, index=False)
        files = {MARGINS_FILE: file_digest(part)}
    write_record(folder / JOB, record.model_copy(update={"files": files}))


def _is_whole(path: Path, record: JobRecord) -> bool:
    """Say whether margins are those that a record was written with; older records do not say."""
    digest = record.files.get(path.name)
    return path.is_file() and (digest is None or file_digest(path) == digest)


def _margins(path: Path, record: JobRecord) -> pd.DataFrame:
    """Read the margins of a job.

    Raises:
        ValueError: they are missing, or are not those that its record was written with.
    """
    if not _is_whole(path, record):
        allowed = f"the file that {JOB} was written with"
        raise bad_value(str(path), "missing, altered or damaged", allowed, "Repeat eval=referee")
    return pd.read_parquet(path)
