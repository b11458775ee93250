"""What `backbone.compiled` is worth: P-DPO steps of a Llama, its blocks compiled and plain.

    python benchmarks/compiled.py

One process; the two take turns. The first step of the compiled one compiles, and is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import plrhf_worker
import torch
import trl_workload as shared
from rich.console import Console
from rich.table import Table

from plrhf.backbone.compiled import compile_in_training
from plrhf.core.types import PreferenceBatch

DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")


def step(model: Any, batch: PreferenceBatch, dtype: str) -> float:
    """Seconds of a step forward and back."""
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = model.loss(batch)[0].mean()
    loss.backward()
    model.zero_grad()
    return time.perf_counter() - began


def measure(
    dtype: Literal["float32", "bfloat16"], folder: Path, pairs: Path, turns: int
) -> dict[str, float]:
    """Seconds of a step plain and compiled, of the first compiled one, and their ratio."""
    method = shared.Method("ours", "dpo", "plrhf", dtype=dtype, dropout=0.0)
    made = [plrhf_worker.make_ours(method, folder, pairs) for _ in range(2)]
    models = [model.train() for model, _ in made]
    batches = list(made[0][1].train_dataloader())
    for block in models[1].backbone.blocks:
        compile_in_training(block)
    first = [step(model, batches[0], dtype) for model in models][1]
    seconds = [
        [step(model, batches[turn % len(batches)], dtype) for model in models]
        for turn in range(1 + turns)
    ][1:]  # the first warms up
    plain, compiled = (statistics.median(of_model) for of_model in zip(*seconds, strict=True))
    times = statistics.median(one / other for one, other in seconds)
    return {"plain": plain, "compiled": compiled, "first": first, "times": times}


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tldr", choices=list(shared.SHAPES))
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, pairs = Path(scratch, "backbone"), Path(scratch, f"{args.shape}.jsonl")
        shape = {"layers": args.layers, "width": args.width, "vocabulary": args.vocabulary}
        shared.write_backbone(folder, **shape, family="llama")
        shared.write_pairs(pairs, shape=args.shape, vocabulary=args.vocabulary)
        found = {dtype: measure(dtype, folder, pairs, args.turns) for dtype in DTYPES}
    table = Table("dtype", "s/step", "compiled", "first step", "times as fast", title=args.shape)
    for dtype, one in found.items():
        row = (f"{one[name]:.3f}" for name in ("plain", "compiled", "first"))
        table.add_row(dtype, *row, f"{one['times']:.2f}")
    Console(width=80).print(table)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
