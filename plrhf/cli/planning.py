"""``plan=true``: the memory and communication that a run would need."""

from __future__ import annotations

import torch
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from plrhf.backbone.loading import empty_model
from plrhf.backbone.masks import FLEX
from plrhf.backbone.model import Backbone
from plrhf.core.components import Settings
from plrhf.data.features import FeatureSchema
from plrhf.data.usable_rows import MOST_TOKENS
from plrhf.models.base import PersonalModule
from plrhf.models.card import Card
from plrhf.models.loading import build_model
from plrhf.training.plan import GB, HEADROOM, Machine, Plan, Workload, plan_training
from plrhf.training.zero import build_zero3


def plan_run(settings: Settings, *, n_users: int, schema: FeatureSchema) -> Plan:
    """Plan what a training with these settings needs of each of the trainer's GPUs.

    All rows have the largest allowed length: prompts of max_prompt_tokens, and responses that fill
    max_tokens.

    Args:
        settings: of the whole run, as a plain dict.
        n_users: number of train users.
        schema: of the users' features.
    """
    trainer = settings["trainer"]
    backbone = empty_backbone(settings["backbone"])
    with FakeTensorMode(allow_non_fake_inputs=True):  # on the CPU, where autocast is known
        backbone.to_empty(device="cpu")
        return plan_training(
            model_of_shapes(settings, backbone, n_users=n_users, schema=schema),
            workload_of(settings, n_features=schema.n_features),
            precision=trainer["precision"],
            zero3=build_zero3(trainer["zero3"]),
            n_users=n_users,
        )


def workload_of(settings: Settings, *, n_features: int) -> Workload:
    """Return the largest batches that the settings allow."""
    data, trainer = settings["data"], settings["trainer"]
    max_tokens = data["max_tokens"] or MOST_TOKENS
    most = MOST_TOKENS // 2 if data["max_prompt_tokens"] is None else data["max_prompt_tokens"]
    prompt_tokens = min(most, max_tokens - 1)
    return Workload(
        prompt_tokens=prompt_tokens,
        response_tokens=max_tokens - prompt_tokens,
        n_features=n_features,
        batch_size=data["batch_size"],
        batch_tokens=data["batch_tokens"],
        eval_batch_size=data["eval_batch_size"],
        accumulated_batches=trainer["accumulate_grad_batches"],
        n_gpus=n_gpus(trainer),
    )


def n_gpus(trainer: Settings) -> int:
    """Return the number of GPUs on all nodes."""
    return int(trainer["devices"] * trainer["num_nodes"])


def empty_backbone(node: Settings) -> Backbone:
    """Build the backbone of the settings ``backbone`` on the meta device; no weights are read."""
    of_shape = (
        "path",
        "architecture",
        "tiny",
        "dtype",
        "attention",
        "quantization",
        "trust_remote_code",
    )
    shape = {name: node[name] for name in of_shape}
    if shape["attention"] == FLEX:  # which fake tensors do not have: with a mask, a little more
        shape["attention"] = "sdpa"
    with torch.device("meta"):
        return Backbone(
            model=empty_model(**shape),
            trainable=node["trainable"],
            lora=node["lora"],
            gradient_checkpointing=node["gradient_checkpointing"],
        )


def model_of_shapes(
    settings: Settings, backbone: Backbone, *, n_users: int, schema: FeatureSchema
) -> PersonalModule:
    """Build the run's model for `n_users` users without names."""
    card = Card(
        model=settings["model"],
        encoder=settings["encoder"],
        aggregator=settings["aggregator"],
        backbone={},
        users=range(n_users),  # type: ignore[arg-type]  # they are only counted
        features=schema.to_dict(),
        text={},
        fingerprint="",
    )
    return build_model(backbone, card)


def plan_table(plan: Plan, settings: Settings, machine: Machine) -> Table:
    """Format the plan as a table for the terminal."""
    node = settings["backbone"]
    own = "tiny" if node["tiny"] is not None else node["path"]
    name = own if node["architecture"] is None else f"{node['name']} (backbone.architecture)"
    trainer = settings["trainer"]
    how = "ZeRO stage 3"
    if trainer["zero3"] is None:
        how = "DDP" if n_gpus(trainer) > 1 else "no shards"
    table = Table(
        title=f"model={settings['model']['name']} on {name}, GPUs: {n_gpus(trainer)}, {how}",
        caption=f"{100 * HEADROOM:.0f}% of a GPU are left to CUDA and fragmentation",
    )
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    for row in _facts(plan):
        table.add_row(*row)
    table.add_section()
    for what, n_bytes, note in _memory(plan):
        table.add_row(what, f"{n_bytes / GB:,.2f} GB", note)
    table.add_section()
    fits = "fits" if plan.fits(machine.gpu_memory_gb) else "does not fit"
    table.add_row("memory a GPU", f"{plan.total / GB:,.2f} GB", "the larger of the two steps")
    table.add_row("", fits, f"{machine.gpu_memory_gb:g} GB a GPU")
    for what, n_bytes in (("host memory a GPU", plan.host), ("NVMe a GPU", plan.nvme)):
        if n_bytes > 0:
            table.add_row(what, f"{n_bytes / GB:,.2f} GB", "what is offloaded")
    table.add_row("communication a step", f"{plan.communication / GB:,.2f} GB", "a GPU receives")
    table.add_row(
        "checkpoint", f"{plan.checkpoint / GB:,.2f} GB", "what is learned, and its moments"
    )
    return table


def _facts(plan: Plan) -> list[tuple[str, str, str]]:
    """Return the rows of the table that are counts."""
    return [
        ("parameters", f"{plan.parameters:,}", "the user model's among them"),
        ("trainable", f"{plan.trainable:,}", ""),
        ("users", f"{plan.n_users:,}", "of train rows"),
        ("pairs a step", f"{plan.pairs:,}", "over all GPUs"),
        ("row", f"{plan.row_tokens:,} tokens", "prompt, user vectors, both responses"),
    ]


def _memory(plan: Plan) -> list[tuple[str, float, str]]:
    """Return the rows of the table that are parts of a GPU's memory, in bytes."""
    return [
        ("weights", plan.weights, ""),
        ("gradients", plan.gradients, ""),
        ("optimiser", plan.optimiser, ""),
        ("user tables", plan.user_tables, "weights, gradients, optimiser of users"),
        ("gathered", plan.gathered, "weights and gradients not in shards"),
        ("activations, training", plan.training, "of a share of data.batch_size pairs"),
        ("activations, evaluation", plan.evaluation, "of a share of data.eval_batch_size"),
    ]
