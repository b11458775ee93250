"""Reading all records of a source: the good rows, and an account of every other record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from plrhf.core.errors import bad_value
from plrhf.data.parsing import _optional_text, parse_row
from plrhf.data.reasons import BY_PROTOCOL, Reason, Refusal, RefusedRow, refuse
from plrhf.data.rows import Row, Rows

ON_BAD_ROW = ("refuse", "error")


@dataclass
class ReadReport:
    """How many records were read, how many refused for which reason, and the first of each."""

    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def read_rows(
    records: Iterable[tuple[str, Mapping[str, Any] | Refusal]], *, on_bad_row: str = "refuse"
) -> tuple[Rows, ReadReport]:
    """Return the good rows in their order and an account of every record, so none is lost silently.

    Rows without a ``pair_id`` that are alike in prompt, responses and user are numbered: a
    judgment given twice counts twice.

    Args:
        records: pairs of place and record (or the source's refusal), as `Source.records` yields.
        on_bad_row: ``refuse`` counts a bad row and goes on, ``error`` raises its `RefusedRow`;
            what a protocol leaves out (`BY_PROTOCOL`) is counted either way.
    """
    if on_bad_row not in ON_BAD_ROW:
        cure = "Set data.on_bad_row=refuse to count bad rows and go on"
        raise bad_value("data.on_bad_row", on_bad_row, "refuse or error", cure)
    report = ReadReport()
    return Rows.of(_good(records, report, strict=on_bad_row == "error")), report


def _good(
    records: Iterable[tuple[str, Mapping[str, Any] | Refusal]], report: ReadReport, *, strict: bool
) -> Iterator[Row]:
    """Yield the good rows; the others go into the report."""
    first: dict[int, int] = {}  # hash of a pair_id -> the record that had it
    repeats: Counter[str] = Counter()  # derived pair_id -> how often it came again
    for where, record in records:
        report.read += 1
        try:
            if isinstance(record, Refusal):
                raise RefusedRow(record.reason, f"{where}: {record.detail}")
            row = parse_row(record, where)
            if hash(row.pair_id) in first and _optional_text(record, "pair_id", where) is None:
                repeats[row.pair_id] += 1
                row = replace(row, pair_id=f"{row.pair_id}-{repeats[row.pair_id] + 1}")
            key = hash(row.pair_id)  # 64 bits: of 10 million, two coincide once in 400,000 runs
            if key in first:
                cure = f"Give every row its own: record {first[key]:,} has it too"
                allowed = "an id used once"
                refuse(Reason.DUPLICATE_PAIR_ID, where, "pair_id", row.pair_id, allowed, cure)
        except RefusedRow as refused:
            if strict and refused.reason not in BY_PROTOCOL:
                raise
            report.refused[refused.reason.value] += 1
            report.examples.setdefault(refused.reason.value, str(refused))
        else:
            first[key] = report.read
            yield row
