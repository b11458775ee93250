"""What a row costs by the number of rows in a block: writing, reading in order and at random, hashing.

    python benchmarks/row_blocks.py --sizes 32 128 512

Rows are on disk. Microseconds of the CPU a row, the best of some turns.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
from many_rows import sentences, vocabulary
from rich.console import Console
from rich.table import Table

from plrhf.data import store
from plrhf.data.rows import Row, Rows

N_RANDOM = 5_000
MEASURED = ("written", "read in order", "read at random", "hashed")


def make_rows(n_rows: int, n_sentences: int) -> list[Row]:
    """Rows of random sentences, about 60 bytes each."""
    draw, words = random.Random(0), vocabulary()

    def text() -> str:
        return " ".join(sentences(draw, words, n_sentences))

    return [
        Row(
            prompt=text(),
            chosen=text(),
            rejected=text(),
            user_id=f"u{n % 100}",
            prompt_id=f"p{n}",
            pair_id=f"x{n}",
        )
        for n in range(n_rows)
    ]


def measure(made: list[Row]) -> list[float]:
    """Microseconds a row, one for each of `MEASURED`."""
    places = np.random.default_rng(0).integers(len(made), size=N_RANDOM).tolist()
    times = [time.process_time()]
    rows = Rows.from_rows(iter(made))
    times.append(time.process_time())
    for _ in rows:
        pass
    times.append(time.process_time())
    for place in places:
        rows[place]
    times.append(time.process_time())
    rows.content_hash()
    times.append(time.process_time())
    counts = np.array([len(made), len(made), N_RANDOM, len(made)])
    return list(np.diff(times) / counts * 1e6)


def main() -> None:
    """Measure by turns, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--sentences", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    store.IN_MEMORY = 0
    table = Table("sentences a text", "rows a block", *MEASURED)
    found: dict[str, list[float]] = {}
    for n_sentences in args.sentences:
        made = make_rows(args.rows, n_sentences)
        turns: dict[int, list[list[float]]] = {size: [] for size in args.sizes}
        for _ in range(args.turns):
            for size, of_size in turns.items():
                store.BLOCK = size
                of_size.append(measure(made))
        for size, of_size in turns.items():
            best = found[f"{n_sentences}, {size}"] = np.min(of_size, axis=0).tolist()
            table.add_row(str(n_sentences), str(size), *(f"{one:.1f}" for one in best))
    Console(width=90).print(table)
    if args.out is not None:
        args.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
