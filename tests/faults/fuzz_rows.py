"""Files of rows with many kinds of damage, and what reading them must do.

Every file is read, or refused in one line. Of the rows that were not damaged none is lost: each is used,
whatever stands in the rows around it.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plrhf.core.errors import BadValue
from plrhf.data.reading import read_rows
from plrhf.data.sources.jsonl import JsonlSource

FORMATS = ("jsonl", "jsonl.gz", "json", "csv", "parquet")
FIELDS = ("prompt", "chosen", "rejected", "user_id")

VALUES: tuple[Any, ...] = (
    *(
        None,
        "",
        " \t",
        0,
        -1,
        1.5,
        float("nan"),
        float("inf"),
        10**400,
        True,
        [],
        {},
        ["a"],
        {"a": 1},
    ),
    *(
        "\x00",
        "\x1b[2J",
        "a\rb",
        "a\nb",
        "\n" * 5_000,
        '"',
        '""',
        ",",
        "'; DROP TABLE rows; --",
        "=1+1",
    ),
    *(
        "\ud800",
        "\u2028",
        "\u202eabc",
        "\ufeff",
        "é" * 3_000,
        "x" * 10_000,
        "<|endoftext|>",
        "NaN",
        "null",
    ),
    *({"role": "user"}, [{"role": "user", "content": None}], [{"role": 7, "content": "a"}]),
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
)
"""What a field of a row may hold by mistake."""


@dataclass
class Found:
    """Counts over all files, and what went wrong."""

    files: int = 0
    refused_files: int = 0
    read: int = 0
    used: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The counts, and the reasons for which rows were refused, the most frequent first."""
        refused = sum(self.refused.values())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.refused.most_common())
        return (
            f"{self.files:,} files, {self.refused_files:,} refused in one line; {self.read:,} rows read, "
            f"{self.used:,} used, {refused:,} refused ({reasons}); faults: {len(self.faults)}"
        )


def good_rows(draw: random.Random, count: int) -> list[dict[str, Any]]:
    """Rows that can all be used, some with quotes, commas, line breaks and other alphabets."""
    words = ["tea", "été", "日本", 'say "hi"', "a,b", "two\nlines", "🙂", "x;y", "'", "C:\\new"]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 6)))

    rows = []
    for number in range(count):
        row = {
            "prompt": text(),
            "chosen": f"{text()} {number}",
            "rejected": f"{text()} other {number}",
        }
        rows.append({**row, "user_id": f"u{draw.randint(0, 4)}"})
    return rows


def encoded(row: dict[str, Any], kind: str) -> bytes:
    """One record as a line (or lines) of JSON or CSV."""
    if kind == "csv":
        line = io.StringIO(newline="")
        csv.writer(line).writerow([row.get(name, "") for name in FIELDS])
        return line.getvalue().encode(errors="surrogatepass")
    return json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"


def damaged_row(draw: random.Random, row: dict[str, Any], kind: str) -> bytes:
    """One record with a mistake in it that ends where the record ends."""
    way = draw.randrange(6)
    if way == 0:
        row = {**row, draw.choice(FIELDS): draw.choice(VALUES)}
    elif way == 1:
        row = {name: value for name, value in row.items() if name != draw.choice(FIELDS)}
    elif way == 2:
        row = {
            **row,
            draw.choice(["tie", "weight", "id\n", "", "\x1b[31m", "user_features"]): draw.choice(
                VALUES
            ),
        }
    line = encoded(row, kind)
    body, end = line.rstrip(b"\r\n"), b"\r\n" if kind == "csv" else b"\n"
    if way == 3:
        cut = body[: draw.randint(0, len(body))]
        # Within a quoted field of a CSV a cut leaves the quote open, see `stray_quote`.
        body = cut if kind != "csv" or cut.count(b'"') % 2 == 0 else cut + b'"'
    elif way == 4:
        place = draw.randint(0, len(body))
        body = body[:place] + bytes([draw.randint(128, 255)]) + body[place + 1 :]
        if kind == "csv" and body.count(b'"') % 2 == 1:
            body += b'"'
    elif way == 5:
        body = body + b',"more"' if kind == "csv" else b'{"prompt": ' * 3_000 + body
    return body + end


def text_file(draw: random.Random, kind: str) -> tuple[bytes, list[dict[str, Any]]]:
    """A JSON lines or CSV file with some damaged records, and the rows that must survive."""
    rows = good_rows(draw, draw.randint(6, 25))
    kept, lines = [], []
    for row in rows:
        if draw.random() < 0.15:
            lines.append(damaged_row(draw, row, kind))
        else:
            lines.append(encoded(row, kind))
            kept.append(row)
    header = ",".join(FIELDS).encode() + b"\r\n" if kind == "csv" else b""
    mark = b"\xef\xbb\xbf" if draw.random() < 0.1 else b""
    blank = b"\n" if draw.random() < 0.1 else b""
    return mark + header + b"".join(lines) + blank, kept


def stray_quote(draw: random.Random) -> tuple[bytes, list[dict[str, Any]]]:
    """A CSV file in one of whose rows a quote opens and never closes, and the other rows."""
    rows = [
        {name: value.replace("\n", " ").replace('"', "") for name, value in row.items()}
        for row in good_rows(draw, 40)
    ]
    bad = draw.randrange(len(rows))
    lines = [encoded(row, "csv") for row in rows]
    lines[bad] = b'"' + lines[bad]
    return ",".join(FIELDS).encode() + b"\r\n" + b"".join(lines), rows[:bad] + rows[bad + 1 :]


def parquet_file(draw: random.Random, path: Path) -> list[dict[str, Any]]:
    """Write a parquet file whose columns may have odd types; returns the rows that must survive."""
    import pyarrow
    import pyarrow.parquet

    rows = good_rows(draw, draw.randint(6, 25))
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in FIELDS}
    kept = rows
    if draw.random() < 0.6:
        bad = draw.randrange(len(rows))
        columns[draw.choice(FIELDS)][bad] = None
        kept = rows[:bad] + rows[bad + 1 :]
    if draw.random() < 0.3:
        values = [draw.randint(-(2**52), 2**52) for _ in rows]
        columns["when"] = pyarrow.array(values, type=pyarrow.timestamp("s"))
    if draw.random() < 0.3:
        columns["user_id"] = [None if one is None else one.encode() for one in columns["user_id"]]
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path)
    return kept


def turns(*contents: str) -> list[dict[str, Any]]:
    """A chat whose turns have these contents."""
    return [
        {"role": ("user", "assistant")[k % 2], "content": one} for k, one in enumerate(contents)
    ]


LABEL_STUDIO = {
    "data": {"prompt": "p?", "a": "one", "b": "two"},
    "annotations": [
        {"completed_by": 3, "result": [{"type": "pairwise", "value": {"selected": "left"}}]},
        {"completed_by": {"id": 4}, "result": [{"type": "choices", "value": {"choices": ["b"]}}]},
    ],
}
RANKING = [{"value": "response2", "rank": 1}, {"value": "response1", "rank": 2}]
ARGILLA = {
    "fields": {"prompt": "p?", "response1": "one", "response2": "two"},
    "responses": {
        "q": [{"value": "response1", "user_id": "u"}, {"value": RANKING, "user_id": "v"}]
    },
}
FORMS: dict[str, dict[str, Any]] = {
    "label studio": LABEL_STUDIO,
    "argilla": ARGILLA,
    "arena": {
        "prompt": "p?",
        "response_a": "x",
        "response_b": "y",
        "winner": "model_a",
        "judge": "u",
    },
    "chats": {
        "conversation_a": turns("p", "x"),
        "conversation_b": turns("p", "y"),
        **{"winner": "model_b", "judge": "u"},
    },
    "ratings": {"prompt": "p?", "response": "one", "rating": 3, "user_id": "u"},
    "thumbs": {"prompt": "p?", "completion": "one", "label": True, "user_id": "u"},
    "messages": {
        **{"prompt": turns("p"), "user_id": "u"},
        "chosen": turns("p", "x")[1:],
        "rejected": turns("p", "y")[1:],
    },
    "implicit": {"chosen": turns("p", "x"), "rejected": turns("p", "y"), "user_id": "u"},
}
"""A record of each form that is recognised."""


def places_in(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values within a record: keys and indices, from the outermost."""
    within = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    found = [] if before == () else [before]
    for key, one in within:
        found += places_in(one, (*before, key))
    return found


def damaged_record(draw: random.Random, record: dict[str, Any]) -> Any:
    """A copy of a record in which one value is another or gone."""
    record = json.loads(json.dumps(record))
    *outer, last = draw.choice(places_in(record))
    within: Any = record
    for key in outer:
        within = within[key]
    if draw.random() < 0.2:
        del within[last]
    else:
        within[last] = draw.choice(VALUES)
    return record


def fuzz_forms(folder: Path, n_files: int, seed: int) -> Found:
    """Write and read records of all forms, one in each file damaged, and never the first."""
    draw, found = random.Random(seed), Found()
    for number in range(n_files):
        form = list(FORMS)[number % len(FORMS)]
        records: list[Any] = [FORMS[form]] * 4
        records[draw.randint(1, 3)] = damaged_record(draw, FORMS[form])
        path = folder / f"{form} {number}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        used, faults = found.used, len(found.faults)
        read_one(path, [], found)
        if (
            found.used - used < 3
            and form not in ("ratings", "thumbs")
            and len(found.faults) == faults
        ):
            found.faults.append(f"{path.name}: fewer rows used than are whole")
        if len(found.faults) == faults:
            path.unlink()
    return found


def broken(draw: random.Random, content: bytes) -> bytes:
    """A whole file that was cut, has flipped bytes, or is in another encoding."""
    way = draw.randrange(5)
    if way == 0:
        return content[: draw.randint(0, len(content))]
    if way == 1:
        changed = bytearray(content)
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if way == 2:
        start = draw.randint(0, len(content))
        return content[:start] + draw.randbytes(draw.randint(1, 200)) + content[start:]
    if way == 3:
        return content.decode(errors="replace").encode(
            draw.choice(["utf-16", "utf-32", "latin-1"]), "replace"
        )
    return content + content


def read_one(path: Path, kept: list[dict[str, Any]] | None, found: Found) -> None:
    """Read a file and count; note a fault where a rule is broken.

    Args:
        kept: rows that must be used; None: the file as a whole is broken, and any may be lost.
    """
    found.files += 1
    try:
        rows, report = read_rows(JsonlSource(path=str(path)).records())
        said = report.lines()
        found.read += report.read
        found.used += len(rows)
        found.refused.update(report.refused)
        if report.read != len(rows) + sum(report.refused.values()):
            found.faults.append(
                f"{path.name}: {report.read} read, {len(rows)} used, {report.refused}"
            )
        if not all(line.isprintable() for line in said):
            found.faults.append(f"{path.name}: control characters on the terminal")
        if kept is not None:
            used = Counter((row.chosen, row.rejected, row.user_id) for row in rows)
            lost = [
                one for one in kept if used[one["chosen"], one["rejected"], one["user_id"]] == 0
            ]
            if len(lost) > 0:
                found.faults.append(
                    f"{path.name}: {len(lost)} of {len(kept)} good rows lost: {said}"
                )
    except BadValue as error:
        found.refused_files += 1
        if "\n" in str(error):
            found.faults.append(f"{path.name}: refused in more than one line")
        if kept is not None:
            found.faults.append(f"{path.name}: refused whole: {error}")
    except Exception as error:
        found.faults.append(f"{path.name}: {type(error).__name__}: {error}")


def fuzz(folder: Path, n_files: int, seed: int) -> Found:
    """Write and read files of all formats in turn; faulty ones stay in the folder."""
    draw, found = random.Random(seed), Found()
    for number in range(n_files):
        kind = FORMATS[number % len(FORMATS)]
        path, before = folder / f"{number}.{kind}", len(found.faults)
        whole = draw.random() < 0.3
        if kind == "parquet":
            kept: Any = parquet_file(draw, path)
            content = path.read_bytes()
        elif kind == "json":
            rows = good_rows(draw, draw.randint(6, 25))
            bad = draw.randrange(len(rows))
            kept = rows[:bad] + rows[bad + 1 :]
            rows[bad] = draw.choice(VALUES)
            content = json.dumps(rows).encode()
        elif kind == "csv" and draw.random() < 0.3:
            content, kept = stray_quote(draw)
        else:
            content, kept = text_file(draw, kind.split(".")[0])
        if whole:
            content, kept = broken(draw, content), None
        write: Callable[[bytes], bytes] = gzip.compress if kind.endswith("gz") else bytes
        packed = write(content)
        if kind.endswith("gz") and whole and draw.random() < 0.5:
            packed = broken(draw, packed)
        path.write_bytes(packed)
        read_one(path, kept, found)
        if len(found.faults) == before:
            path.unlink()
    return found


def bombs(folder: Path, n_mib: int) -> Found:
    """Read files that unpack to one line or row of so many MiB, or to very many.

    A whole row, which some end with, must be used.
    """
    found = Found()
    good = encoded(good_rows(random.Random(0), 1)[0], "jsonl")
    row = {
        "prompt": "p" * 300_000,
        "chosen": "c" * 90_000,
        "rejected": "r" * 90_000,
        "user_id": "u",
    }
    header, part = ",".join(FIELDS).encode() + b"\n", 1 + n_mib // 8
    for name, begin, filler, n_blocks, end in (
        ("zeros.jsonl", b"", b"0", n_mib, b"\n" + good),
        ("open.jsonl", b"", b'{"prompt": "', n_mib, b"\n" + good),
        ("lines.jsonl", b"", b"\n", 1 + n_mib // 200, b"\n" + good),
        ("rows.jsonl", b"", encoded(row, "jsonl"), part, b""),
        ("wide.jsonl", codecs.BOM_UTF16_LE, b"0\0", part, b""),
        ("list.jsonl", b"[", b"0", part, b"]"),
        ("items.jsonl", b"[", b'["' + b"x" * 9_000 + b'"],', part, b"0]"),
        ("zeros.csv", header, b"0", part, b"\np,c,r,u\n"),
        ("header.csv", b"", b"0", part, b"\np,c,r,u\n"),
        ("commas.csv", header, b",", part, b"\np,c,r,u\n"),
        ("open.csv", header + b'"', b"0" * 400_000 + b"\n", part, b"p,c,r,u\n"),
        ("quotes.csv", header, b'"x","' + b"0" * 99_000 + b"\n", 1 + n_mib // 200, b"\n"),
    ):
        path = folder / f"{name}.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(begin)
            block = filler * (2**20 // len(filler) + 1)
            for _ in range(n_blocks):
                file.write(block)
            file.write(end)
        used = found.used
        read_one(path, None, found)
        if end.endswith((good, b"u\n")) and name != "header.csv" and found.used == used:
            found.faults.append(f"{name}: the row at its end was lost")
        path.unlink()
    one_value(folder / "values.parquet", row, n_rows=2 * n_mib)
    read_one(folder / "values.parquet", None, found)
    return found


def one_value(path: Path, row: dict[str, Any], n_rows: int) -> None:
    """Write a parquet file that holds each value once, for so many rows."""
    import pyarrow
    import pyarrow.parquet

    table = {
        name: pyarrow.DictionaryArray.from_arrays([0] * n_rows, [one]) for name, one in row.items()
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
