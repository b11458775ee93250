"""What users cost: a P-DPO step with few users and with many, tables sparse and dense.

    python benchmarks/many_users.py

One process; the variants take turns. Memory is what weights, gradients and optimiser state of the
user tables take, by their sizes, after steps were taken.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from plrhf.aggregators import FiLM
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj
from plrhf.core.types import PreferenceBatch
from plrhf.data.packing import TokenPair, packed
from plrhf.encoders import ClusterMixtureEncoder, LookupEncoder
from plrhf.models.optim import Optim, clip_gradients
from plrhf.models.policy import PersonalDPOPolicy

VOCABULARY, N_PROMPT, N_RESPONSE, N_PAIRS = 1000, 100, 40, 16
LORA = {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"}


def make(encoder: str, n_users: int, *, sparse: bool) -> tuple[PersonalDPOPolicy, Any]:
    """A tiny policy with this many users, and its optimiser."""
    torch.manual_seed(0)
    language_model = tiny_gptj(
        vocab_size=VOCABULARY,
        n_layers=4,
        width=128,
        n_heads=4,
        max_positions=256,
        eos_token_id=0,
    )
    backbone = Backbone(model=language_model, lora=LORA)
    film = FiLM(hidden_size=128, n_blocks=4)
    settings: dict[str, Any] = {
        "n_users": n_users,
        "user_dim": film.user_dim,
        "vocabulary": backbone.vocabulary(),
        "sparse": sparse,
    }
    users = (
        LookupEncoder(rank=4, **settings)
        if encoder == "lookup"
        else ClusterMixtureEncoder(n_clusters=10, **settings)
    )
    model = PersonalDPOPolicy(
        backbone=backbone, encoder=users, aggregator=film, n_users=n_users + 1
    )
    optimizer, _ = Optim(user_weight_decay=0.1).build(
        backbone=backbone.parameters(),
        user=[*users.parameters(), *film.parameters()],
        head=(),
        total_steps=100,
    )
    return model.train(), optimizer


def make_batch(n_users: int, draw: random.Random) -> PreferenceBatch:
    """Random pairs of random users, as if their reference had been computed."""

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, VOCABULARY) for _ in range(count))

    pairs = [
        TokenPair(tokens(N_PROMPT), tokens(N_RESPONSE), tokens(N_RESPONSE)) for _ in range(N_PAIRS)
    ]
    input_ids, segment, position_ids = packed(pairs)
    return PreferenceBatch(
        user_id=torch.tensor([draw.randint(1, n_users) for _ in pairs]),
        features=torch.zeros(N_PAIRS, 0),
        input_ids=input_ids,
        segment=segment,
        position_ids=position_ids,
        row=torch.arange(N_PAIRS),
        ref_logps=torch.zeros(N_PAIRS, 2),
    )


def step(model: PersonalDPOPolicy, optimizer: Any, batch: PreferenceBatch) -> float:
    """Seconds of one training step."""
    began = time.perf_counter()
    optimizer.apply_delayed_decay(batch.user_id)
    model.loss(batch)[0].mean().backward()
    clip_gradients([one for one in model.parameters() if one.grad is not None], 1.0)
    optimizer.step()
    return time.perf_counter() - began


def held(model: PersonalDPOPolicy, optimizer: Any) -> int:
    """Bytes of the user tables, of their gradients and of their optimiser state."""
    total = 0
    for table in model.encoder.user_parameters():
        total += table.nbytes
        if table.grad is not None:
            grad = table.grad
            total += grad.coalesce().values().nbytes if grad.is_sparse else grad.nbytes
        state = optimizer.state[table].values()
        total += sum(one.nbytes for one in state if isinstance(one, torch.Tensor))
    return total


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, nargs="+", default=[100, 1_000_000])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    draw = random.Random(0)
    few, *_ = args.users
    found = []
    table = Table("encoder", "tables", "users", "s/step", f"of that with {few}", "MiB of tables")
    for encoder in ("lookup", "cluster"):
        names = [(kind, n) for kind in ("sparse", "dense") for n in args.users]
        made = {(kind, n): make(encoder, n, sparse=kind == "sparse") for kind, n in names}
        seconds: dict[Any, list[float]] = {name: [] for name in names}
        for turn in range(2 + args.turns):  # the first two warm up
            for name, (model, optimizer) in made.items():
                optimizer.zero_grad()
                taken = step(model, optimizer, make_batch(name[1], draw))
                if turn > 1:
                    seconds[name].append(taken)
        for (kind, n), (model, optimizer) in made.items():
            base = seconds[kind, few]
            ratio = statistics.median(b / a for a, b in zip(base, seconds[kind, n], strict=True))
            median, size = statistics.median(seconds[kind, n]), held(model, optimizer) / 2**20
            table.add_row(encoder, kind, f"{n:,}", f"{median:.3f}", f"{ratio:.2f}", f"{size:.1f}")
            found.append(
                {
                    "encoder": encoder,
                    "tables": kind,
                    "users": n,
                    "seconds_a_step": median,
                    "times_few_users": ratio,
                    "table_mib": size,
                }
            )
    Console(width=90).print(table)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
