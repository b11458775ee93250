"""What users cost when texts are written: 64 users in one batch beside 64 copies of one user.

    python benchmarks/generation.py

One process; the variants take turns. All rows answer one prompt, as when many users ask the same,
and none ends before its time, so that rates differ by the work alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from plrhf.aggregators import ConcatSoftPrompt, FiLM
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj
from plrhf.core.types import UserBatch
from plrhf.encoders import LookupEncoder
from plrhf.models.generation import generate
from plrhf.models.policy import PersonalDPOPolicy

VOCABULARY, N_LAYERS, WIDTH, END = 2048, 6, 256, 0
LORA = {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"}
AGGREGATORS: dict[str, Callable[[], Any]] = {
    "FiLM, last layer": lambda: FiLM(hidden_size=WIDTH, n_blocks=N_LAYERS, user_dim=WIDTH),
    "FiLM, every block": lambda: FiLM(
        hidden_size=WIDTH, n_blocks=N_LAYERS, user_dim=WIDTH, site="every_block"
    ),
    "soft prompt": lambda: ConcatSoftPrompt(hidden_size=WIDTH),
}


class Counting:
    """A tokenizer that counts instead of spelling."""

    eos_token_id = pad_token_id = END

    def batch_decode(self, rows: Any, *, skip_special_tokens: bool) -> list[str]:
        return [str(len(row)) for row in rows]


def make(aggregator: str, n_users: int) -> PersonalDPOPolicy:
    """A policy whose users differ and whose texts go on."""
    torch.manual_seed(0)
    language_model = tiny_gptj(
        vocab_size=VOCABULARY,
        n_layers=N_LAYERS,
        width=WIDTH,
        n_heads=4,
        max_positions=2048,
        eos_token_id=END,
    )
    with torch.no_grad():
        language_model.lm_head.bias[END] = -1e4
    backbone = Backbone(model=language_model, lora=LORA)
    acts = AGGREGATORS[aggregator]()
    users = LookupEncoder(
        n_users=n_users, user_dim=acts.user_dim, vocabulary=backbone.vocabulary(), rank=4
    )
    for weight in acts.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return PersonalDPOPolicy(backbone=backbone, encoder=users, aggregator=acts, n_users=n_users + 1)


def tokens_a_second(
    policy: PersonalDPOPolicy, users: list[int], *, n_prompt: int, n_new: int
) -> float:
    """New tokens of all users' texts on one prompt, a second."""
    batch = UserBatch(user_id=torch.tensor(users), features=torch.zeros(len(users), 0))
    prompts = [range(1, 1 + n_prompt)] * len(users)
    began = time.perf_counter()
    written = generate(
        policy,
        Counting(),
        prompts,
        batch,
        max_new_tokens=n_new,
        temperature=0.0,
    )
    seconds = time.perf_counter() - began
    assert written == [str(n_new)] * len(users)
    return len(users) * n_new / seconds


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=350, help="its tokens")
    parser.add_argument("--new", type=int, default=48, help="tokens written")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    different, copies = list(range(1, 1 + args.users)), [1] * args.users
    policies = {name: make(name, args.users) for name in AGGREGATORS}
    unshared = make("FiLM, last layer", args.users)
    unshared.backbone.prefill = lambda *_: None  # type: ignore[method-assign]
    variants = {
        (name, who): (policy, users)
        for name, policy in policies.items()
        for who, users in (("different", different), ("copies", copies))
    }
    variants["FiLM, last layer", "read by every row"] = unshared, different
    rates: dict[Any, list[float]] = {variant: [] for variant in variants}
    for turn in range(1 + args.turns):  # the first warms up
        for variant, (policy, users) in variants.items():
            rate = tokens_a_second(policy, users, n_prompt=args.prompt, n_new=args.new)
            if turn > 0:
                rates[variant].append(rate)

    def times(one: Any, other: Any) -> float:
        return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))

    table = Table("aggregator", "tokens/s", "of that of copies of one user")
    found = {}
    for name in AGGREGATORS:
        rate, ratio = (
            statistics.median(rates[name, "different"]),
            times((name, "different"), (name, "copies")),
        )
        table.add_row(name, f"{rate:.0f}", f"{ratio:.2f}")
        found[name] = {"tokens_a_second": rate, "times_copies": ratio}
    shared = times(("FiLM, last layer", "different"), ("FiLM, last layer", "read by every row"))
    found["FiLM, last layer"]["times_unshared"] = shared
    Console(width=80).print(table)
    print(f"FiLM at the last layer, prompt read once: {shared:.2f} times as fast as by every row")
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
