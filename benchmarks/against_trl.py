"""How fast a step is, beside TRL's trainers on the same pairs, backbone and LoRA.

    python benchmarks/against_trl.py --out benchmark.json
    python benchmarks/against_trl.py --shapes tldr --turns 3 --out tldr.json

Every method trains in a process of its own, through its own trainer's real loop; the processes take
turns, a few steps each, so that a machine that slows down slows all of them. Seconds are medians
over the turns; ratios are medians of the ratios of neighbouring turns.

Ours takes both contexts of every pair (the user's and the generic user's), the reference computed
beforehand, with the default user model (lookup, FiLM) and with the authors' (lookup, soft prompt),
the vectors in front of the prompt ("soft prompt") or after it ("late soft prompt").
TRL knows no users; for the same loss it takes every row twice, once as the generic user's: on the
authors' recipe with the reference at every step, and at its best with the reference beforehand.
"Vanilla" is TRL with every row once, which is half the work and another loss.

Both have the authors' LoRA dropout of 0.05; the methods that matter most are run without it too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from trl_workload import (
    DROPOUT,
    METHODS,
    SHAPES,
    WITHOUT_DROPOUT,
    write_backbone,
    write_pairs,
)
from turns import Worker, matmul_peak, take_turns, workers_of


def measure(shape: str, names: list[str], folder: Path, scratch: Path, args: Any) -> list[dict]:
    """Runs of these methods on one shape, turn by turn; all of them are in memory at once."""
    pairs = scratch / f"{shape}.jsonl"
    write_pairs(pairs, shape=shape, vocabulary=args.vocabulary)
    steps = SHAPES[shape].steps if args.steps is None else args.steps
    scripts = {name: METHODS[name].script for name in names}
    with workers_of(scripts, folder, pairs) as workers:
        turns = take_turns(workers, steps=steps, n_turns=args.turns)
        counted = {worker.name: worker.turn(1, order="count")["flops"] for worker in workers}
    peaks = {dtype: matmul_peak(dtype) for dtype in {METHODS[name].dtype for name in names}}
    return [
        summary(shape, worker, turns[worker.name], counted[worker.name], peaks)
        for worker in workers
    ]


def summary(shape: str, worker: Worker, turns: list[dict], flops: float, peaks: dict) -> dict:
    """What one method took on one shape."""
    method = METHODS[worker.name]
    seconds = [turn["seconds"] / turn["steps"] for turn in turns]
    step = statistics.median(seconds)
    form = SHAPES[shape]
    n_pairs, n_tokens = form.batch, form.n_prompt + 2 * form.n_response
    return {
        "shape": shape,
        "pairs_a_step": n_pairs,
        "method": worker.name,
        "model": method.model,
        "dtype": method.dtype,
        "dropout": method.dropout,
        "seconds_a_step": step,
        "turns": seconds,
        "pairs_a_second": n_pairs / step,
        "tokens_a_second": n_pairs * n_tokens / step,
        "flops_a_step": flops,
        "utilisation": flops / step / peaks[method.dtype],
        "matmul_peak": peaks[method.dtype],
        "peak_mib": turns[-1]["peak"],
        "step_mib": turns[-1]["peak"] - worker.start["now"],
    }


def ratio(runs: list[dict], shape: str, ours: str, theirs: str, field: str = "turns") -> float:
    """How many times theirs is ours: median over neighbouring turns, or of one figure."""
    by_name = {run["method"]: run for run in runs if run["shape"] == shape}
    mine, other = by_name[ours][field], by_name[theirs][field]
    if field != "turns":
        return other / mine
    return statistics.median(b / a for a, b in zip(mine, other, strict=True))


COMPARED = {
    "dpo": {
        "vs_authors_recipe": ("dpo ours", "dpo TRL, authors' recipe"),
        "vs_precomputed_reference": ("dpo ours", "dpo TRL, reference beforehand"),
        "vs_vanilla": ("dpo ours", "dpo TRL, reference beforehand, vanilla"),
        "soft_prompt_vs_authors_recipe": ("dpo ours, soft prompt", "dpo TRL, authors' recipe"),
        "soft_prompt_vs_precomputed_reference": (
            "dpo ours, soft prompt",
            "dpo TRL, reference beforehand",
        ),
        "late_soft_prompt_vs_authors_recipe": (
            "dpo ours, late soft prompt",
            "dpo TRL, authors' recipe",
        ),
        "late_vs_early_soft_prompt": ("dpo ours, late soft prompt", "dpo ours, soft prompt"),
        "bfloat16_vs_float32": ("dpo ours, bfloat16", "dpo ours"),
    },
    "reward": {
        "vs_trl": ("reward ours", "reward TRL"),
        "vs_vanilla": ("reward ours", "reward TRL, vanilla"),
        "soft_prompt_vs_trl": ("reward ours, soft prompt", "reward TRL"),
        "late_soft_prompt_vs_trl": ("reward ours, late soft prompt", "reward TRL"),
        "late_vs_early_soft_prompt": ("reward ours, late soft prompt", "reward ours, soft prompt"),
        "bfloat16_vs_float32": ("reward ours, bfloat16", "reward ours"),
    },
}
"""For each model the ratios by name, and the method of ours and the other one that it is of."""


def compared(runs: list[dict], shape: str, *, suffix: str = "", field: str = "turns") -> dict:
    """Ratios of one shape by model and name, as far as both methods were run.

    Args:
        suffix: of the methods' names. field: as in `ratio`.
    """
    names = {run["method"] for run in runs if run["shape"] == shape}
    found: dict[str, dict[str, float]] = {}
    for model, pairs in COMPARED.items():
        found[model] = {}
        for key, (ours, theirs) in pairs.items():
            if names >= {ours + suffix, theirs + suffix}:
                value = ratio(runs, shape, ours + suffix, theirs + suffix, field)
                found[model][key] = value
    return found


def results(runs: list[dict]) -> dict[str, Any]:
    """Ratios of time with and without dropout and of memory, by shape, and all runs."""
    shapes = list(dict.fromkeys(run["shape"] for run in runs))
    memory = {shape: compared(runs, shape, field="step_mib") for shape in shapes}
    for models in memory.values():
        for these in models.values():
            these.pop("bfloat16_vs_float32", None)  # a comparison of speeds
    return {
        "dropout": DROPOUT,
        "ratios": {shape: compared(runs, shape) for shape in shapes},
        "ratios_without_dropout": {
            shape: compared(runs, shape, suffix=WITHOUT_DROPOUT) for shape in shapes
        },
        "memory": memory,
        "runs": runs,
    }


def show(found: dict[str, Any]) -> None:
    """One table of all runs."""
    table = Table()
    for name in ("shape", "method", "s/step", "pairs/s", "tokens/s", "utilisation", "step MiB"):
        table.add_column(name, justify="left" if name in ("shape", "method") else "right")
    for run in found["runs"]:
        table.add_row(
            run["shape"],
            run["method"],
            f"{run['seconds_a_step']:.3f}",
            f"{run['pairs_a_second']:.1f}",
            f"{run['tokens_a_second']:.0f}",
            f"{run['utilisation']:.0%}",
            f"{run['step_mib']:.0f}",
        )
    Console(width=110).print(table)
    for part, what in (
        ("ratios", "times as fast"),
        ("ratios_without_dropout", "times as fast without dropout"),
        ("memory", "times less memory a step"),
    ):
        for shape, models in found[part].items():
            for model, these in models.items():
                for key, value in these.items():
                    print(f"{shape} {model} {key}: {value:.2f} {what}")


def main() -> None:
    """Measure what the command line asks for and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    usual = [name for name, method in METHODS.items() if not method.at_best]
    parser.add_argument("--methods", nargs="+", default=usual, choices=list(METHODS))
    parser.add_argument("--steps", type=int, help="a turn, instead of the shape's own")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2048)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "backbone")
        write_backbone(folder, layers=args.layers, width=args.width, vocabulary=args.vocabulary)
        runs: list[dict[str, Any]] = []
        for shape in args.shapes:
            for model in ("dpo", "reward"):
                names = [name for name in args.methods if METHODS[name].model == model]
                runs += measure(shape, names, folder, Path(scratch), args)
                found = results(runs)
                args.out.write_text(json.dumps(found, indent=2) + "\n")
    show(found)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
