"""What a file of cached tokens costs: opening, pairs in order and at random, steps of training.

    python benchmarks/token_cache.py --rows 1000000 --beside ../before

Random tokens (36 a pair on average) are written to a cache. Then fresh processes open it, read all
pairs, and train a tiny reward model on random pairs, by turns with the code of another working tree.
Seconds are those of the CPU. Printed are medians over turns, and ratios to the other tree's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from many_rows import VOCABULARY, make_model
from resident import resident
from rich.console import Console
from rich.table import Table

from plrhf.data.dataset import PairDataset
from plrhf.data.packing import TokenPair
from plrhf.data.tokenizer import TokenizedRow
from plrhf.data.tokens import load_or_tokenize

BATCH = 64


class Numbers:
    """Rows that are their numbers."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, at: slice) -> range:
        return range(self.n)[at]

    def digest(self, **_: object) -> str:
        """Names the cached file."""
        return str(self.n)


class RandomTokens:
    """Tokenises rows to random tokens: 8 to 16 of prompt and of each response."""

    tokenizer = range(VOCABULARY)
    reads_people = False
    eos_token_id = 0

    def __len__(self) -> int:
        return VOCABULARY

    def digest(self) -> str:
        """Names the cached file."""
        return "random"

    def tokens(self, rows: list[int]) -> list[TokenizedRow]:
        """Random tokens, the same for the same rows."""
        draw = np.random.default_rng(rows[0])
        ids = draw.integers(1, VOCABULARY, (len(rows), 3, 16)).tolist()
        lengths = draw.integers(8, 17, (len(rows), 3)).tolist()
        return [
            TokenizedRow(TokenPair(*(tuple(one[:n]) for one, n in zip(*both, strict=True))))
            for both in zip(ids, lengths, strict=True)
        ]


class Clock:
    """Seconds of this process's CPU between calls."""

    def __init__(self) -> None:
        self.before = time.process_time()

    def __call__(self) -> float:
        now = time.process_time()
        taken, self.before = now - self.before, now
        return taken


def measure(cache_dir: Path, n_rows: int, steps: int) -> dict[str, float]:
    """Seconds of opening and of steps, microseconds a pair."""

    def opened() -> Any:
        return load_or_tokenize(Numbers(n_rows), RandomTokens(), cache_dir=cache_dir)  # type: ignore[arg-type]

    opened()  # what is imported on the way, and the file in the system's memory
    found, mapped, clock = {}, resident()["mapped"], Clock()
    pairs = opened()
    found["opening, s"] = clock()
    found["mapped then, MiB"] = resident()["mapped"] - mapped
    order = np.random.default_rng(0).permutation(n_rows)
    for name, indices in (("at random", order), ("in order", range(n_rows))):
        pairs = opened()
        for again in ("first", "again"):
            clock()
            for index in indices:
                pairs[index]
            found[f"a pair {name}, {again}, us"] = clock() / n_rows * 1e6
    dataset = PairDataset.from_tokens(opened())
    model = make_model(RandomTokens(), n_users=1)
    optimizer = torch.optim.SGD(model.backbone.parameters(), 1e-3)
    clock()
    for step in range(steps):
        batch = dataset.batch(order[step * BATCH % n_rows :][:BATCH].tolist())
        model.training_step(batch, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    found["a step, ms"] = clock() / steps * 1e3
    return found


def main() -> None:
    """Write the caches, measure by turns, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--beside", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print("@" + json.dumps(measure(args.measure, args.rows, args.steps)))
        return
    trees = {"here": Path(__file__).parent.parent, "beside": args.beside.resolve()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for _ in range(args.turns):
            for name, tree in trees.items():
                sizes = [f"--rows={args.rows}", f"--steps={args.steps}"]
                own = [*sizes, f"--measure={Path(folder) / name}"]
                said = subprocess.run(
                    [sys.executable, __file__, *own],
                    check=True,
                    env={**os.environ, "PYTHONPATH": str(tree)},
                    stdout=subprocess.PIPE,
                    text=True,
                ).stdout
                found[name].append(json.loads(said[said.index("@") + 1 :]))
                print(name, found[name][-1], flush=True)
    table = Table("", "here", "beside", "ratio")
    for key in found["here"][0]:
        here, beside = (median(one[key] for one in found[name]) for name in trees)
        table.add_row(key, f"{here:.3f}", f"{beside:.3f}", f"{here / beside:.3f}")
    Console(width=90).print(table)
    if args.out is not None:
        args.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
