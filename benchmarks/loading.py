"""Memory of each process while a checkpoint in several files is read into shards (ZeRO stage 3).

    python benchmarks/loading.py --layers 9 --out found.json

A GPT-J with random float32 weights, its proportions those of the real one, is saved as transformers
saves it, and read by CPU processes over gloo. Resident memory counts mapped pages of files, too. What
a process has before it loads (interpreter and libraries) is given apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from resident import forget_peak, resident
from transformers import GPTJConfig, GPTJForCausalLM
from transformers.utils.logging import disable_progress_bar

from plrhf.backbone.loading import load_model
from plrhf.cli.main import silence_libraries
from plrhf.training.processes import gather_objects, launched_processes, sharding_context
from plrhf.training.trainer import build_trainer
from plrhf.training.zero import Zero3

POSITIONS, VOCABULARY_A_WIDTH = 2048, 12.3  # of GPT-J 6B: 50,400 tokens, width 4,096


def save(directory: Path, *, layers: int, width: int, file_size: str) -> None:
    """Write the model to `directory`."""
    config = GPTJConfig(
        vocab_size=round(VOCABULARY_A_WIDTH * width / 3),
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        rotary_dim=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    disable_progress_bar()
    GPTJForCausalLM(config).save_pretrained(directory, max_shard_size=file_size)


def measure(directory: Path, n_processes: int) -> list[dict[str, float]] | None:
    """MiB before, at most while and after loading, of each process; on rank 0 alone."""
    silence_libraries()
    trainer = build_trainer(
        run_dir=directory,
        loggers=[],
        has_val=False,
        max_steps=1,
        accelerator="cpu",
        devices=n_processes,
        zero3=Zero3(persistent_below=0),
        progress=False,
    )
    with launched_processes(trainer):
        with sharding_context(trainer)():
            torch.nn.Linear(3, 3)  # what DeepSpeed sets up on first use is none of the model
        before = resident()["held"]
        forget_peak()
        model = load_model(str(directory), shards=sharding_context(trainer))
        now = resident()
        own = {"before": before, "peak": now["peak"], "after": now["held"]}
        weights: Iterable[Any] = model.parameters()  # with DeepSpeed's attributes
        own["model"] = sum(4 * one.ds_numel for one in weights) / 2**20
        found = gather_objects(own)
    return found if trainer.is_global_zero else None


def main() -> None:
    """Make the model, load it in processes of their own, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--file-size", default="100MB")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path, help="one that was saved, instead of making one")
    args = parser.parse_args()
    if args.model is None:
        with tempfile.TemporaryDirectory() as made:
            save(Path(made), layers=args.layers, width=args.width, file_size=args.file_size)
            # Anew, so that memory of making it is none of theirs.
            again = [sys.executable, *sys.argv, "--model", made]
            sys.exit(subprocess.run(again).returncode)
    found = measure(args.model, args.processes)
    if found is None:
        return
    files = len(list(args.model.glob("*.safetensors")))
    print(f"model: {found[0]['model']:.0f} MiB in {files} files")
    for rank, own in enumerate(found):
        own["above"] = own["peak"] - own["before"]
        mib = {name: f"{value:.0f}" for name, value in own.items()}
        above, whole = (own[name] / own["model"] for name in ("above", "peak"))
        print(
            f"process {rank}: {mib['before']} MiB before, {mib['peak']} at most, "
            f"{mib['after']} after; of the model {above:.2f} above before, {whole:.2f} in all"
        )
    if args.out is not None:
        args.out.write_text(json.dumps({"files": files, "processes": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
