"""Reads all records of a source, keeps the good rows, and counts the others by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from plrhf.core.errors import bad_value, printable
from plrhf.core.progress import with_progress
from plrhf.data.feature_kinds import FeatureKinds, settle_features
from plrhf.data.messages import shared_beginning
from plrhf.data.parsing import LONGEST_ROW, has_pair_id, parse_row
from plrhf.data.reasons import BY_PROTOCOL, Reason, Refusal, RefusedRow, refuse
from plrhf.data.rows import ROW_FIELDS, Row, Rows

ON_BAD_ROW = ("refuse", "error")


@dataclass
class ReadReport:
    """Counts of the records that were read and refused.

    Attributes:
        read: number of records.
        refused: number of refused records by reason. examples: the first message of each reason.
        unread: number of records with a field that no row field is made from, by field.
        implicit: number of rows whose prompt is what chosen and rejected begin with.
        strengths: number of rows that say how much better the chosen response is.
        form: name of the form that the source converted its records from; None: they were rows.
    """

    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    implicit: int = 0
    strengths: int = 0
    form: str | None = None

    def refuse(self, reason: Reason, message: str, n_rows: int = 1) -> None:
        """Count refused rows and keep the first message of their reason."""
        self.refused[reason.value] += n_rows
        self.examples.setdefault(reason.value, message)

    def lines(self) -> list[str]:
        """Return the lines that the terminal shows after reading; none if every row is used."""
        said = [] if self.form is None else [f"read as {self.form.replace('_', ' ')}"]
        n_refused = sum(self.refused.values())
        if n_refused > 0:
            said.append(f"refused: {n_refused:,} of {self.read:,} records")
            for reason, count in self.refused.most_common():
                said.append(f"  {count:,} {reason}, first {_short(self.examples[reason])}")
        if self.implicit > 0:
            said.append(
                f"no prompt field: of {self.implicit:,} rows it is what chosen and rejected share"
            )
        if self.strengths > 0:
            said.append(
                f"strength: in {self.strengths:,} rows, used where model.target_margin is above 0"
            )
        unknown = list(self.unread)
        if len(unknown) > 0:
            more = f" and {len(unknown) - 8} others" if len(unknown) > 8 else ""
            names = ", ".join(printable(one) or "(no name)" for one in unknown[:8])
            said.append(f"fields not read: {names}{more}")
        return said

    def check_some_left(self) -> None:
        """Raise a ValueError that gives the reasons if no record was usable."""
        if self.read == 0:
            cure = "Check that data.path names the right file, and that it is not empty"
            raise bad_value("rows", "0 records", "at least one row", cure)
        if sum(self.refused.values()) < self.read:
            return
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.refused.most_common())
        by_protocol = {reason.value for reason in BY_PROTOCOL}  # nothing is wrong with these
        named = [name for name, _ in self.refused.most_common()]
        first = self.examples[min(named, key=by_protocol.__contains__)]
        cure = f"Mend what the first one names: {first.removesuffix('.')}"
        shown = f"0 of {self.read:,} usable"
        raise bad_value("rows", shown, f"rows of the row format (refused: {reasons})", cure)


def _short(message: str) -> str:
    """Make a message printable, and cut it at 240 characters."""
    message = printable(message)
    return message if len(message) <= 240 else message[:237] + "..."


def read_rows(
    records: Iterable[tuple[str, Mapping[str, Any] | Refusal]],
    *,
    on_bad_row: str = "refuse",
    ties: bool = False,
    feature_kinds: FeatureKinds | None = None,
    without: Collection[str] = (),
    max_row_bytes: int = LONGEST_ROW,
) -> tuple[Rows, ReadReport]:
    """Read all records, and return the good rows in their order with a report on the others.

    Equal rows without a ``pair_id`` get numbered ids, so a choice made twice counts twice. If the
    first record has no field ``prompt``, the beginning that chosen and rejected share is the prompt,
    as in TRL's implicit form.

    Args:
        records: pairs of place and record (or refusal), as `Source.records` yields them.
        on_bad_row: ``refuse`` counts a bad row and goes on, ``error`` raises its `RefusedRow`.
            Records that a dataset's protocol leaves out (`BY_PROTOCOL`) are counted in both cases.
        ties: keep rows in which neither response was preferred; else they are refused.
        feature_kinds: kinds of a trained model's user features; None: decided by majority.
        without: ids of users whose rows are left out, and counted.
        max_row_bytes: of a row's texts together; rows with more are refused.
    """
    if on_bad_row not in ON_BAD_ROW:
        cure = "Set data.on_bad_row=refuse to count bad rows and go on"
        raise bad_value("data.on_bad_row", on_bad_row, "refuse or error", cure)
    report = ReadReport()
    strict = on_bad_row == "error"
    places: dict[str, str] = {}  # user -> where their first row with features stands
    rows = Rows.from_rows(
        _good_rows(
            records, report, places, strict=strict, ties=ties, without=without, most=max_row_bytes
        )
    )
    people, refused = settle_features(rows.people, feature_kinds)
    if len(refused) > 0:
        bad = np.isin(rows.person, np.array(list(refused), dtype=np.int32))
        number = min(refused)
        detail = f"{places[rows.people[number].user_id]}: {refused[number]}"
        if strict:
            raise RefusedRow(Reason.BAD_USER_FEATURES, detail)
        report.refuse(Reason.BAD_USER_FEATURES, detail, int(bad.sum()))
        rows = rows.select(np.flatnonzero(~bad))
    rows.people = people
    assert report.read == len(rows) + sum(report.refused.values())
    return rows, report


def _good_rows(
    records: Iterable[tuple[str, Mapping[str, Any] | Refusal]],
    report: ReadReport,
    places: dict[str, str],
    *,
    strict: bool,
    ties: bool,
    without: Collection[str],
    most: int,
) -> Iterator[Row]:
    """Yield the good rows, and count the others in the report.

    Args:
        places: user id -> place of their first row with features; filled here.
        strict: raise the error of the first bad row. ties: keep ties.
        most: bytes of a row. others: see `read_rows`.
    """
    first: dict[int, int] = {}  # hash of a pair_id -> the record that had it
    repeats: Counter[str] = Counter()  # derived pair_id -> how often it came again
    implicit: bool | None = None
    known = frozenset(ROW_FIELDS)
    for where, record in with_progress(records, "reading rows"):
        report.read += 1
        try:
            if isinstance(record, Refusal):
                raise RefusedRow(record.reason, f"{where}: {record.detail}")
            if not known.issuperset(record):
                report.unread.update(name for name in record if name not in known)
            if implicit is None:
                implicit = "prompt" not in record
            if implicit and "prompt" not in record:
                record = _with_prompt(record)
                report.implicit += "prompt" in record
            row = parse_row(record, where, max_bytes=most)
            if row.user_id in without:  # whose id is not repeated
                raise RefusedRow(Reason.LEFT_OUT, f"{where}: {Reason.LEFT_OUT}")
            if row.verdict == "tie" and not ties:
                allowed, cure = "a choice", "Set model.ties=shared, to learn from ties"
                refuse(Reason.TIE, where, "verdict", "tie", allowed, cure)
            if hash(row.pair_id) in first and not has_pair_id(record, where):
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
            report.refuse(refused.reason, str(refused))
        else:
            first[key] = report.read
            report.strengths += row.strength is not None
            if row.user_features is not None:
                places.setdefault(row.user_id, where)
            yield row


def read_ids(path: str | None) -> frozenset[str]:
    """Return the ids in a file with one a line; none without a file.

    Raises:
        ValueError: the file cannot be read.
    """
    if path is None:
        return frozenset()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        allowed, cure = "a text file in UTF-8, one user id a line", f"Mend the file ({error})"
        raise bad_value("data.without_users", path, allowed, cure) from error
    return frozenset(text.splitlines()) - {""}


PROMPT_LIKE = ("prompt", "question", "instruct", "query", "input", "context", "post", "message")
"""Parts of field names that suggest a prompt. No prompt is guessed if there is such a field."""


def may_lack_prompt(names: Iterable[str]) -> bool:
    """Whether records with these fields may have their prompt inside chosen and rejected."""
    others = [name.casefold() for name in names if name not in ROW_FIELDS]
    return not any(part in name for name in others for part in PROMPT_LIKE)


def _with_prompt(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Move the beginning that chosen and rejected share into a prompt, if there is any."""
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if not (isinstance(chosen, str) and isinstance(rejected, str) and may_lack_prompt(record)):
        return record
    prompt = shared_beginning(chosen, rejected)
    if not prompt.strip():
        return record
    n = len(prompt)
    return {**record, "prompt": prompt, "chosen": chosen[n:], "rejected": rejected[n:]}
