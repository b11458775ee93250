"""What holds for any input, by hypothesis: no row is lost, and no text acts where it is shown."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plrhf.core.errors import printable
from plrhf.data.reading import read_rows
from plrhf.data.rows import ROW_FIELDS
from plrhf.data.sources.formats import csv_header, csv_rows
from plrhf.data.sources.json_list import list_items
from plrhf.encoders.odd import most_likely
from plrhf.reporting.tables import csv_text

settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("same")
pytestmark = pytest.mark.slow

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted(ROW_FIELDS)) | st.text(max_size=8)
GOOD = st.fixed_dictionaries(dict.fromkeys(("prompt", "chosen", "rejected", "user_id"), st.text()))
RECORDS = st.lists(st.dictionaries(NAMES, VALUES) | GOOD, max_size=12)
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(RECORDS)
def test_every_record_is_a_row_or_refused(records: list[dict[str, Any]]) -> None:
    rows, report = read_rows((f"f:{n}", one) for n, one in enumerate(records))
    assert report.read == len(records) == len(rows) + sum(report.refused.values())
    assert all(line.isprintable() for line in report.lines())
    assert all(line.startswith("f:") for line in report.examples.values())


@given(st.lists(st.tuples(CELLS, CELLS), max_size=8))
def test_a_csv_file_is_read_as_it_was_written(
    tmp_path_factory: Any, rows: list[tuple[str, str]]
) -> None:
    path = Path(tmp_path_factory.getbasetemp(), "rows.csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("prompt", "chosen"), *rows])
    assert csv_header(str(path)) == ["prompt", "chosen"]
    assert [tuple(row.values()) for _, row in csv_rows(path)] == rows


@given(st.lists(VALUES, max_size=8), st.sampled_from((None, 0, 3)))
def test_a_json_list_is_what_json_makes_of_it(values: list[Any], indent: int | None) -> None:
    text = json.dumps(values, indent=indent)
    found = list(list_items(io.StringIO(text), object_hook=dict, longest=10**6))
    assert json.dumps(found) == json.dumps(json.loads(text))


@given(st.text())
def test_what_is_printed_moves_no_cursor_and_no_formula_starts(text: str) -> None:
    assert printable(text).isprintable()
    written = csv_text(pd.DataFrame({"run": [text]}))
    cell = list(csv.reader(io.StringIO(written)))[1][0]
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31))
def test_who_makes_the_opposite_choices_has_the_opposite_vector(k: int, r: int, seed: int) -> None:
    x = torch.randn(2, k, r, generator=torch.Generator().manual_seed(seed)).double()
    weight, shared = torch.ones(2, k).double(), torch.zeros(2, k).double()
    own, opposite = (most_likely(sign * x, weight, shared, steps=4) for sign in (1, -1))
    torch.testing.assert_close(opposite, -own)
