"""How fast a step is, beside TRL's trainers on the same pairs, backbone and LoRA.

    python benchmarks/against_trl.py --out benchmark.json

Every method trains in a process of its own, through its own trainer's real loop; the processes take
turns, a few steps each, so that a machine that slows down slows all of them. Seconds are medians
over the turns; ratios are medians of the ratios of neighbouring turns.

Ours takes both contexts of every pair (the user's and the generic user's), the reference computed
beforehand, with the default user model (lookup, FiLM) and with the authors' (lookup, soft prompt).
TRL knows no users; for the same loss it takes every row twice, once as the generic user's: on the
authors' recipe with the reference at every step, and at its best with the reference beforehand.
"Vanilla" is TRL with every row once, which is half the work and another loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resident import resident
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens of prompt and response (end token among them), pairs in all and a step, steps a turn."""

    n_prompt: int
    n_response: int
    n_pairs: int = 24
    batch: int = 4
    steps: int = 2


SHAPES = {
    "tldr": Shape(n_prompt=350, n_response=35),
    "chat": Shape(n_prompt=100, n_response=200),
    # TRL's attention takes 3 GiB a pair here, on the authors' recipe.
    "long": Shape(n_prompt=1500, n_response=200, n_pairs=6, batch=1, steps=1),
}


@dataclass(frozen=True)
class Method:
    """One way to train: its model, whose trainer, its dtype, and what it does with rows."""

    name: str
    model: str  # dpo, reward
    trainer: str  # plrhf, trl
    dtype: str = "float32"
    aggregator: str = "film"
    rows_a_pair: int = 1
    online_reference: bool = False


METHODS = {
    one.name: one
    for one in (
        Method("dpo ours", "dpo", "plrhf"),
        Method("dpo ours, bfloat16", "dpo", "plrhf", dtype="bfloat16"),
        Method("dpo ours, soft prompt", "dpo", "plrhf", aggregator="soft_prompt"),
        Method("dpo TRL, authors' recipe", "dpo", "trl", rows_a_pair=2, online_reference=True),
        Method("dpo TRL, reference beforehand", "dpo", "trl", rows_a_pair=2),
        Method("dpo TRL, reference beforehand, vanilla", "dpo", "trl"),
        Method("reward ours", "reward", "plrhf"),
        Method("reward ours, bfloat16", "reward", "plrhf", dtype="bfloat16"),
        Method("reward ours, soft prompt", "reward", "plrhf", aggregator="soft_prompt"),
        Method("reward TRL", "reward", "trl", rows_a_pair=2),
        Method("reward TRL, vanilla", "reward", "trl"),
    )
}
N_USERS, N_TOKENS = 8, 10
LORA = {"r": 8, "alpha": 16, "dropout": 0.0}
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]


# What all methods share: a backbone and pairs on disk.


def write_backbone(folder: Path, *, layers: int, width: int, vocabulary: int) -> None:
    """A GPT-J of random weights with a tokenizer of one token a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, GPTJConfig, PreTrainedTokenizerFast

    words = {"<end>": 0, **{f"w{i}": i for i in range(1, vocabulary)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = {"eos_token": "<end>", "pad_token": "<end>", "unk_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **end).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=vocabulary,
        n_positions=2048,
        n_embd=width,
        n_layer=layers,
        n_head=max(1, width // 64),
        rotary_dim=min(64, width),
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_pairs(path: Path, *, shape: str, vocabulary: int) -> None:
    """Pairs of the shape's lengths: rows of random words, users in turn."""
    import random

    draw = random.Random(0)
    n_prompt, n_response = SHAPES[shape].n_prompt, SHAPES[shape].n_response
    n_pairs = SHAPES[shape].n_pairs

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(1, vocabulary)}" for _ in range(count))

    rows = [
        {
            "prompt": words(n_prompt),
            "chosen": words(n_response - 1),  # and the end token
            "rejected": words(n_response - 1),
            "user_id": f"user {i % N_USERS}",
            "split": "train" if i < n_pairs else "test",
        }
        for i in range(n_pairs + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# A worker: one method, which takes as many steps as it is told.


class Turns:
    """Called after every step: waits for orders when it has taken the steps it was told to."""

    def __init__(self) -> None:
        self.left = self.told = 0
        self.began = 0.0
        self.counter: Any = None

    def step_over(self) -> None:
        """Report when the turn is over, then wait for the next."""
        self.left -= 1
        if self.left > 0:
            return
        if self.told > 0:
            seconds = time.perf_counter() - self.began
            self._report(seconds)
        order = sys.stdin.readline().split()
        if not order:
            sys.exit(0)
        self.told = self.left = int(order[1])
        if order[0] == "count":
            self.counter = flop_counter()
            self.counter.__enter__()
        self.began = time.perf_counter()

    def _report(self, seconds: float) -> None:
        flops = None
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            flops, self.counter = self.counter.get_total_flops(), None
        say(seconds=seconds, steps=self.told, flops=flops, **memory())


def flop_counter() -> Any:
    """Counts operations of matrix products and of attention, what is computed a second time left out."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def product(_y: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    def forward(q: Any, k: Any, v: Any, _dropout: Any = 0, causal: Any = False, **_: Any) -> int:
        return sdpa_flop_count(q, k, v) // (2 if causal else 1)

    def backward(_dy: Any, q: Any, k: Any, v: Any, *others: Any, **_: Any) -> int:
        _y, _lse, dropout, causal = others
        return 2 * forward(q, k, v, dropout, causal)

    aten: Any = torch.ops.aten
    missing = {  # torch's counter takes these for free
        aten.addmm_: product,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=missing)


def say(**values: Any) -> None:
    """One line of JSON to the parent."""
    print("@" + json.dumps(values), file=sys.__stdout__, flush=True)


def memory() -> dict[str, float]:
    """Resident memory of this process now and at its highest, in MiB."""
    import torch

    if torch.cuda.is_available():
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return {"now": now / 2**20, "peak": peak / 2**20}
    found = resident()
    return {"now": found["held"], "peak": found["peak"]}


def make_ours(method: Method, folder: Path, pairs: Path) -> tuple[Any, Any]:
    """This package's model for a method, and its pairs, reference computed."""
    import lightning

    from plrhf.aggregators import ConcatSoftPrompt, FiLM
    from plrhf.backbone.loading import load_backbone, load_tokenizer
    from plrhf.data.module import PreferenceData
    from plrhf.data.sources.jsonl import JsonlSource
    from plrhf.encoders import LookupEncoder
    from plrhf.models.policy import PersonalDPOPolicy
    from plrhf.models.reward import PersonalRewardModel

    lightning.seed_everything(0, verbose=False)
    data = PreferenceData(
        source=JsonlSource(path=str(pairs)),
        seed=0,
        batch_size=SHAPES[pairs.stem].batch,
        eval_batch_size=4,
        max_prompt_tokens=1600,
        max_tokens=2000,
        separator=" ",
    )
    backbone = load_backbone(
        path=str(folder), dtype=method.dtype, lora={**LORA, "target_modules": TARGETS}
    )
    width = backbone.hidden_size
    aggregator: Any = (
        ConcatSoftPrompt(hidden_size=width, n_tokens=N_TOKENS)
        if method.aggregator == "soft_prompt"
        else FiLM(hidden_size=width, n_blocks=backbone.config.num_hidden_layers)
    )
    encoder = LookupEncoder(
        n_users=data.n_users, user_dim=aggregator.user_dim, vocabulary=backbone.vocabulary()
    )
    kind = PersonalDPOPolicy if method.model == "dpo" else PersonalRewardModel
    model = kind(
        backbone=backbone, encoder=encoder, aggregator=aggregator, n_users=data.n_users + 1
    )
    data.tokenize(load_tokenizer(str(folder)), causal=True, max_positions=model.max_positions)
    if isinstance(model, PersonalDPOPolicy):
        data.precompute_reference(model.reference_logps)
    return model, data


def train_ours(method: Method, folder: Path, pairs: Path, turns: Turns) -> None:
    """Train with this package; the first step waits for orders."""
    import lightning

    model, data = make_ours(method, folder, pairs)

    class Gate(lightning.Callback):
        def on_train_start(self, *_: Any) -> None:
            say(ready=True, **memory())
            turns.step_over()

        def on_train_batch_end(self, *_: Any) -> None:
            turns.step_over()

    trainer = lightning.Trainer(
        max_steps=1_000_000,
        max_epochs=-1,
        precision="bf16-mixed" if method.dtype == "bfloat16" else "32-true",
        callbacks=[Gate()],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)


def train_trl(method: Method, folder: Path, pairs: Path, turns: Turns) -> None:
    """Train with TRL; the first step waits for orders."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    rows = load_dataset("json", data_files=str(pairs), split="train", cache_dir=str(pairs.parent))
    rows = rows.filter(lambda row: row["split"] == "train")
    assert len(rows) == SHAPES[pairs.stem].n_pairs, "with more, one step an epoch is short"
    rows = rows.select_columns(["prompt", "chosen", "rejected"])
    rows = rows.map(lambda row: {"prompt": row["prompt"] + " "})

    class Gate(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            say(ready=True, **memory())
            turns.step_over()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.step_over()

    twice = [i for i in range(len(rows)) for _ in range(method.rows_a_pair)]
    is_dpo = method.model == "dpo"
    settings: dict[str, Any] = {
        "output_dir": str(pairs.parent / "trl"),
        "per_device_train_batch_size": SHAPES[pairs.stem].batch * method.rows_a_pair,
        "max_steps": 1_000_000,
        "max_length": 2000,
        "gradient_checkpointing": False,
        "bf16": method.dtype == "bfloat16",
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1_000_000,
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": method.dtype},
    }
    if is_dpo:
        settings["precompute_ref_log_probs"] = not method.online_reference
    trainer = (DPOTrainer if is_dpo else RewardTrainer)(
        model=str(folder),
        args=(DPOConfig if is_dpo else RewardConfig)(**settings),
        train_dataset=rows.select(twice),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(
            r=LORA["r"],
            lora_alpha=LORA["alpha"],
            lora_dropout=LORA["dropout"],
            target_modules=TARGETS,
            task_type="CAUSAL_LM" if is_dpo else "SEQ_CLS",
        ),
        callbacks=[Gate()],
    )
    trainer.train()


def work(name: str, folder: Path, pairs: Path) -> None:
    """Train by the named method until no more orders come."""
    method = METHODS[name]
    sys.stdout = sys.stderr  # stdout is the parent's
    (train_ours if method.trainer == "plrhf" else train_trl)(method, folder, pairs, Turns())


# The parent: it lets the workers take turns.


class Worker:
    """A process that trains by one method when told to."""

    def __init__(self, name: str, folder: Path, pairs: Path) -> None:
        self.name = name
        self.log = (pairs.parent / f"{name}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", name, str(folder), str(pairs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.start: dict[str, Any] = {}

    def ready(self) -> None:
        """Wait until it is about to take its first step."""
        self.start = self._answer()

    def turn(self, steps: int, *, order: str = "time") -> dict[str, Any]:
        """Take `steps` steps; order "count" counts their operations too."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order} {steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        self.log.seek(0)
        raise RuntimeError(f"{self.name} ended early:\n{self.log.read()[-3000:]}")


def matmul_peak(dtype: str) -> float:
    """Floating-point operations a second of the fastest of some large matrix products."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if device == "cuda" else 2048
    left = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        left @ left
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def measure(shape: str, names: list[str], folder: Path, scratch: Path, args: Any) -> list[dict]:
    """Runs of these methods on one shape, turn by turn; all of them are in memory at once."""
    pairs = scratch / f"{shape}.jsonl"
    write_pairs(pairs, shape=shape, vocabulary=args.vocabulary)
    steps = SHAPES[shape].steps if args.steps is None else args.steps
    workers = [Worker(name, folder, pairs) for name in names]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for worker in workers:
            worker.ready()
        for worker in workers:  # to warm up
            worker.turn(2)
        for _ in range(args.turns):
            for worker in workers:
                turns[worker.name].append(worker.turn(steps))
        counted = {worker.name: worker.turn(1, order="count")["flops"] for worker in workers}
    finally:
        for worker in workers:
            worker.close()
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


def results(runs: list[dict]) -> dict[str, Any]:
    """Ratios by shape, memory by shape, and all runs."""
    ratios: dict[str, Any] = {}
    saved: dict[str, Any] = {}
    for shape in dict.fromkeys(run["shape"] for run in runs):
        names = {run["method"] for run in runs if run["shape"] == shape}
        wanted = {
            "dpo": {
                "vs_authors_recipe": ("dpo ours", "dpo TRL, authors' recipe"),
                "vs_precomputed_reference": ("dpo ours", "dpo TRL, reference beforehand"),
                "vs_vanilla": ("dpo ours", "dpo TRL, reference beforehand, vanilla"),
                "soft_prompt_vs_authors_recipe": (
                    "dpo ours, soft prompt",
                    "dpo TRL, authors' recipe",
                ),
                "soft_prompt_vs_precomputed_reference": (
                    "dpo ours, soft prompt",
                    "dpo TRL, reference beforehand",
                ),
                "bfloat16_vs_float32": ("dpo ours, bfloat16", "dpo ours"),
            },
            "reward": {
                "vs_trl": ("reward ours", "reward TRL"),
                "vs_vanilla": ("reward ours", "reward TRL, vanilla"),
                "soft_prompt_vs_trl": ("reward ours, soft prompt", "reward TRL"),
                "bfloat16_vs_float32": ("reward ours, bfloat16", "reward ours"),
            },
        }
        had = {
            model: {key: pair for key, pair in these.items() if names >= set(pair)}
            for model, these in wanted.items()
        }
        ratios[shape] = {
            model: {key: ratio(runs, shape, *pair) for key, pair in these.items()}
            for model, these in had.items()
        }
        saved[shape] = {
            model: {
                key: ratio(runs, shape, *pair, field="step_mib")
                for key, pair in these.items()
                if not key.startswith("bfloat16")
            }
            for model, these in had.items()
        }
    return {"ratios": ratios, "memory": saved, "runs": runs}


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
    for part, what in (("ratios", "times as fast"), ("memory", "times less memory a step")):
        for shape, models in found[part].items():
            for model, these in models.items():
                for key, value in these.items():
                    print(f"{shape} {model} {key}: {value:.2f} {what}")


def main() -> None:
    """Measure what the command line asks for and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, help="a turn, instead of the shape's own")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        work(args.work[0], Path(args.work[1]), Path(args.work[2]))
        return
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
