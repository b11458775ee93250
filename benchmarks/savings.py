"""What each saving of a P-DPO step is worth: the step with it left out, beside the step as it is.

    python benchmarks/savings.py --shape tldr

One process, one backbone; the variants take turns. A saving's share is how many times as long a step
takes without it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import plrhf_worker
import torch
import trl_workload as shared
from peft.tuners.lora import Linear as LoraLinear
from rich.console import Console
from rich.table import Table
from torch import Tensor

from plrhf.core.logprobs import response_logps
from plrhf.core.types import PreferenceBatch
from plrhf.data.packing import two_rows


def as_it_is(model: Any, batch: PreferenceBatch) -> PreferenceBatch:
    """Nothing left out."""
    return batch


def reference_every_step(model: Any, batch: PreferenceBatch) -> PreferenceBatch:
    """The reference is asked again."""
    batch.ref_logps = None
    return batch


def transformers_trunk(model: Any, batch: PreferenceBatch) -> PreferenceBatch:
    """GPT-J as transformers runs it."""
    model.backbone.is_gptj = False
    return batch


def pefts_lora(model: Any, batch: PreferenceBatch) -> PreferenceBatch:
    """LoRA layers as PEFT runs them."""
    for module in model.backbone.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = LoraLinear
    return batch


def logits_everywhere(model: Any, batch: PreferenceBatch) -> PreferenceBatch:
    """Logits of all positions, of which those of the responses are then used."""

    def logps(self: Any, hidden: Tensor, batch: PreferenceBatch) -> Tensor:
        logits = self.backbone.unembed(hidden).float()
        return response_logps(
            logits,
            batch.input_ids,
            batch.segment,
            lambda one: one,
            n_pairs=len(batch),
            constant=True,
        )

    model.logps = MethodType(logps, model)
    return batch


def a_trunk_for_each_context(model: Any, batch: PreferenceBatch) -> PreferenceBatch:
    """The trunk runs for the user and again for the generic user."""
    once = type(model).hidden

    def hidden(self: Any, batch: PreferenceBatch, names: tuple[str, ...]) -> Tensor:
        return torch.cat([once(self, batch, (name,)) for name in names])

    model.hidden = MethodType(hidden, model)
    return batch


VARIANTS: dict[str, Callable[[Any, PreferenceBatch], PreferenceBatch]] = {
    "as it is": as_it_is,
    "reference at every step": reference_every_step,
    "prompt twice (two rows a pair)": as_it_is,
    "transformers' GPT-J": transformers_trunk,
    "PEFT's LoRA": pefts_lora,
    "logits at all positions": logits_everywhere,
    "a trunk for each context": a_trunk_for_each_context,
}


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tldr", choices=list(shared.SHAPES))
    parser.add_argument(
        "--aggregator", default="film", choices=["film", "soft_prompt", "late_soft_prompt"]
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as scratch:
        folder, pairs = Path(scratch, "backbone"), Path(scratch, f"{args.shape}.jsonl")
        shared.write_backbone(folder, layers=6, width=256, vocabulary=2048)
        shared.write_pairs(pairs, shape=args.shape, vocabulary=2048)
        method = shared.Method("ours", "dpo", "plrhf", aggregator=args.aggregator, dropout=0.0)
        made = {name: plrhf_worker.make_ours(method, folder, pairs) for name in VARIANTS}
        made["prompt twice (two rows a pair)"][1].datasets["train"].layout = two_rows
        batches = {name: list(data.train_dataloader()) for name, (_, data) in made.items()}
        for turn in range(1 + args.turns):  # the first warms up
            for name, change in VARIANTS.items():
                model = made[name][0].train()
                batch = change(model, batches[name][turn])
                began = time.perf_counter()
                model.loss(batch)[0].mean().backward()
                if turn > 0:
                    seconds[name].append(time.perf_counter() - began)
                model.zero_grad()
    base = seconds["as it is"]
    found = {
        name: {
            "seconds": statistics.median(values),
            "times": statistics.median(b / a for a, b in zip(base, values, strict=True)),
        }
        for name, values in seconds.items()
    }
    table = Table("left out", "s/step", "times as long", title=f"{args.shape}, {args.aggregator}")
    for name, one in found.items():
        table.add_row(name, f"{one['seconds']:.3f}", f"{one['times']:.2f}")
    Console(width=80).print(table)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
