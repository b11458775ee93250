"""What rows cost: memory above the model while a file of many pairs is read, tokenised, trained on.

    python benchmarks/many_rows.py --rows 5000000

Writes a parquet file of random sentences in a temporary directory (``--scratch``, about 250 bytes a
pair with all that is made of it), then goes the way of a run in one process: rows, splits, tokens,
probes, training steps of a tiny reward model. The base is what the process holds once the model is
made; the peak is the kernel's (VmHWM), pages of mapped files among it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import pyarrow as arrow
from pyarrow.parquet import ParquetWriter
from resident import forget_peak, resident
from rich.console import Console
from rich.table import Table

from plrhf.aggregators import FiLM
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj, train_tokenizer
from plrhf.data.module import PreferenceData
from plrhf.data.sources.jsonl import JsonlSource
from plrhf.encoders import LookupEncoder
from plrhf.evaluation.probes import probe
from plrhf.models.optim import Optim
from plrhf.models.reward import PersonalRewardModel
from plrhf.training.loggers import build_loggers
from plrhf.training.trainer import build_trainer, fit

WIDTH, N_LAYERS, VOCABULARY = 64, 2, 2048
AT_ONCE = 100_000
SETTINGS: dict[str, Any] = {
    "seed": 0,
    "batch_size": 64,
    "eval_batch_size": 256,
    "val_fraction": 0.001,
    "test_fraction": 0.001,
    "max_tokens": 64,
}


def sentences(draw: random.Random, words: list[str], count: int) -> list[str]:
    """Sentences of 8 to 20 words."""
    return [" ".join(draw.choices(words, k=draw.randint(8, 20))) for _ in range(count)]


def vocabulary() -> list[str]:
    """1,000 words, most of them one token."""
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefghij", k=draw.randint(2, 4))) for _ in range(1000)]


def write(path: Path, *, n_rows: int, n_users: int) -> None:
    """Random pairs of random users, no prompt twice."""
    draw, words = random.Random(1), vocabulary()
    names = ("prompt", "chosen", "rejected", "user_id")
    schema = arrow.schema([(name, arrow.string()) for name in names])
    with ParquetWriter(path, schema) as writer:
        for start in range(0, n_rows, AT_ONCE):
            count = min(AT_ONCE, n_rows - start)
            texts = [sentences(draw, words, count) for _ in range(3)]
            users = [f"user{draw.randrange(n_users)}" for _ in range(count)]
            writer.write_table(arrow.table([*texts, users], schema=schema))


def make_model(tokenizer: Any, n_users: int) -> PersonalRewardModel:
    """A tiny reward model for this many users."""
    language_model = tiny_gptj(
        vocab_size=len(tokenizer),
        n_layers=N_LAYERS,
        width=WIDTH,
        n_heads=4,
        max_positions=128,
        eos_token_id=tokenizer.eos_token_id,
    )
    backbone = Backbone(model=language_model, trainable="full")
    film = FiLM(hidden_size=WIDTH, n_blocks=N_LAYERS, user_dim=WIDTH)
    encoder = LookupEncoder(
        n_users=n_users,
        user_dim=film.user_dim,
        vocabulary=backbone.vocabulary(),
        rank=4,
        sparse=True,
    )
    return PersonalRewardModel(
        backbone=backbone,
        encoder=encoder,
        aggregator=film,
        n_users=n_users + 1,
        optim=Optim(warmup_steps=0),
    )


def run(scratch: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The stages of a run, with seconds and memory at the end of each."""
    lightning.seed_everything(0, verbose=False)
    tokenizer = train_tokenizer(
        sentences(random.Random(2), vocabulary(), 2000), vocab_size=VOCABULARY
    )
    model = make_model(tokenizer, args.users)
    forget_peak()
    base = resident()["held"]
    found: list[dict[str, Any]] = []
    began, computed = time.perf_counter(), time.process_time()

    def stage(name: str) -> None:
        nonlocal began, computed
        spent = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - computed}
        now = {key: value - base * (key != "mapped") for key, value in resident().items()}
        found.append({"stage": name, **spent, **now})
        print(json.dumps(found[-1]), flush=True)
        began, computed = time.perf_counter(), time.process_time()

    data = PreferenceData(source=JsonlSource(path=str(scratch / "rows.parquet")), **SETTINGS)
    data.batch_tokens = args.batch_tokens
    stage("read and divided")
    for name in ("tokenised", "tokens found again"):
        data.tokenize(tokenizer, layout="packed", cache_dir=scratch)
        stage(name)
    probe(data.splits)
    stage("probed")
    trainer = build_trainer(
        run_dir=scratch,
        loggers=build_loggers(run_dir=scratch),
        has_val=True,
        max_steps=args.steps,
        val_every_n_steps=args.steps,
        accelerator="cpu",
        progress=False,
    )
    fit(model, data, trainer, resume_from=None)
    stage(f"trained {args.steps} steps")
    return found


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write is not None:
        write(args.write, n_rows=args.rows, n_users=args.users)
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        scratch = Path(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        own = [f"--rows={args.rows}", f"--users={args.users}"]
        # Its memory is not the run's.
        subprocess.run(
            [sys.executable, __file__, *own, f"--write={scratch / 'rows.parquet'}"], check=True
        )
        found = run(scratch, args)
    titles = ("seconds", "of this CPU", "MiB held above the model", "mapped files", "peak")
    table = Table("stage", *titles)
    for one in found:
        numbers = [one[name] for name in ("seconds", "cpu", "held", "mapped", "peak")]
        table.add_row(one["stage"], *(f"{number:,.0f}" for number in numbers))
    Console(width=90).print(table)
    if args.out is not None:
        args.out.write_text(json.dumps({"rows": args.rows, "stages": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
