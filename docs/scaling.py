"""The figure and tables of scaling.md, from plrhf.training.plan alone: python docs/scaling.py"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import matplotlib
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from plrhf.cli.main import CONF
from plrhf.cli.planning import plan_run
from plrhf.data.features import FeatureSchema
from plrhf.training.plan import GB, HEADROOM, Plan

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend has been chosen)

HERE = Path(__file__).parent
TLDR = [
    *("model=dpo", "data=jsonl", "data.path=unread", "aggregator=soft_prompt"),
    *("data.max_prompt_tokens=550", "data.max_tokens=600"),
]
PAIRS, EVAL_PAIRS = 4, 8  # of a GPU
GPTJ = ["backbone=gptj_6b"]
LIKE_GPTJ = ["backbone=hf", "backbone.dtype=bfloat16", "backbone.gradient_checkpointing=true"]
LLAMA = "{model_type:llama,vocab_size:128256,num_key_value_heads:8,hidden_size:%d,"
LLAMA += "intermediate_size:%d,num_hidden_layers:%d,num_attention_heads:%d}"
MODELS = {
    "GPT-J 6B": GPTJ,
    "Llama 3 8B": [*LIKE_GPTJ, f"backbone.architecture={LLAMA % (4096, 14336, 32, 32)}"],
    "Llama 3 70B": [*LIKE_GPTJ, f"backbone.architecture={LLAMA % (8192, 28672, 80, 64)}"],
}
ENCODERS = {
    "lookup, full (10 x 4096)": ["encoder.rank=null"],
    "clusters, K = 10": ["encoder=cluster", "encoder.n_clusters=10"],
    "lookup, rank 4": [],
}
ONE_BLOCK = [*GPTJ, "+backbone.architecture.n_layer=1"]


OFFLOAD = ["trainer.zero3.offload_optimizer=cpu", "trainer.zero3.offload_parameters=cpu"]


def planned(*overrides: str, users: int = 1000, gpus: int | None = None) -> Plan:
    """The plan on one GPU without shards, or of ZeRO-3 on that many."""
    how = ["trainer=gpu"] if gpus is None else ["trainer=zero3", f"trainer.devices={gpus}"]
    n_gpus = 1 if gpus is None else gpus
    how += [f"data.batch_size={n_gpus * PAIRS}", f"data.eval_batch_size={n_gpus * EVAL_PAIRS}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", overrides=[*TLDR, *how, *overrides])
    settings: Any = OmegaConf.to_container(node, resolve=True)
    return plan_run(settings, n_users=users, schema=FeatureSchema(moments={}, codes={}))


def models() -> None:
    """A table of what each model needs of a GPU; offloaded, one GPU is enough."""
    for name, overrides in MODELS.items():
        ways: list[tuple[int | None, str, list[str]]] = [(1, "1, offloaded", OFFLOAD), (8, "8", [])]
        if "70B" not in name:  # whose weights alone fill two GPUs
            ways.insert(0, (None, "1", []))
        for gpus, label, more in ways:
            plan = planned(*overrides, *more, gpus=gpus)
            learned = plan.gradients + plan.optimiser
            parts = (plan.weights, learned, plan.gathered, plan.training, plan.total)
            cells = [f"{part / GB:.1f}" for part in (*parts, plan.host, plan.communication)]
            print(f"| {name} | {label} | {' | '.join(cells)} |", flush=True)


def small_gpus() -> None:
    """A table of Llama 3 8B in fewer bits on one GPU, and how many pairs a step fit in 24 GB."""
    for quantization in ("null", "int8", "nf4"):
        plan = planned(*MODELS["Llama 3 8B"], f"backbone.quantization={quantization}")
        kept = plan.total - max(plan.training, plan.evaluation)
        a_pair = plan.training / PAIRS
        n_pairs = max(0, int(((1 - HEADROOM) * 24 * GB - kept) / a_pair))
        cells = [f"{part / GB:.1f}" for part in (plan.weights, kept, a_pair, plan.evaluation)]
        print(f"| {quantization} | {' | '.join(cells)} | {n_pairs} |", flush=True)


def by_gpus(axes: Any) -> None:
    counts = [1, 4, 16, 64]
    plans = [planned(*GPTJ, gpus=count) for count in counts]
    parts = {
        "weights": [p.weights / GB for p in plans],
        "gathered": [p.gathered / GB for p in plans],
        "activations": [p.training / GB for p in plans],
        "learned and its optimiser": [
            (p.gradients + p.optimiser + p.user_tables) / GB for p in plans
        ],
    }
    axes.stackplot(counts, list(parts.values()), labels=list(parts))
    axes.set(xscale="log", xlabel="GPUs (ZeRO-3)", ylabel="GB a GPU", title="GPT-J 6B, P-DPO")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.legend(frameon=False, fontsize=8)


def by_users(axes: Any) -> None:
    counts = [10**4, 10**6, 10**8]
    for name, overrides in ENCODERS.items():
        plans = [planned(*ONE_BLOCK, *overrides, users=n, gpus=8) for n in counts]
        tables = [plan.user_tables / GB for plan in plans]
        print(name, *(f"{n:.0e}: {table:.4g} GB" for n, table in zip(counts, tables, strict=True)))
        axes.loglog(counts, tables, marker="o", label=name)
    axes.axhline(80, color="grey", linestyle=":")
    axes.set(xlabel="users", ylabel="GB a GPU", title="User tables on 8 GPUs")
    axes.legend(frameon=False, fontsize=8)


def by_length(axes: Any) -> None:
    lengths = [300, 600, 1200]
    for name, overrides in {
        "GPT-J 6B": [*GPTJ, "backbone.gradient_checkpointing=false"],
        "GPT-J 6B, recomputing": GPTJ,
        "Llama 3 8B, recomputing": MODELS["Llama 3 8B"],
    }.items():
        needed = []
        for length in lengths:
            rows = [f"data.max_prompt_tokens={length - 100}", f"data.max_tokens={length - 50}"]
            needed.append(planned(*overrides, *rows, gpus=1).training / GB / PAIRS)
        cells = (f"{n}: {gb:.3g} GB" for n, gb in zip(lengths, needed, strict=True))
        print(name, *cells, flush=True)
        axes.loglog(lengths, needed, marker="o", label=name)
    axes.set(xlabel="tokens a row", ylabel="GB a pair", title="Activations")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    warnings.filterwarnings("ignore")
    models()
    small_gpus()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    by_gpus(axes[0])
    by_users(axes[1])
    by_length(axes[2])
    figure.savefig(HERE / "scaling.png", dpi=110)


if __name__ == "__main__":
    main()
