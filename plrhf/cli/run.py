"""One run: build, seed, fit, evaluate, write the run directory."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning
import pandas as pd
import yaml
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only

from plrhf.backbone.masks import FLEX
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj
from plrhf.core.components import Settings, accepted, build, first_difference
from plrhf.core.errors import bad_value
from plrhf.data.build import build_data
from plrhf.data.features import FeatureSchema
from plrhf.data.module import PreferenceData
from plrhf.evaluation.generations import (
    GenerationOptions,
    requested_rows,
    requested_users,
    write_generations,
)
from plrhf.evaluation.predictions import Prepare, engine, predict, prepare
from plrhf.evaluation.probes import probe
from plrhf.evaluation.results import summarise_run, write_evaluation
from plrhf.evaluation.users import write_users
from plrhf.models.base import PersonalModule
from plrhf.models.card import Card
from plrhf.models.export import save_export
from plrhf.models.loading import build_model
from plrhf.models.optim import Optim
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.reporting import report, tables
from plrhf.training.checkpoints import read_checkpoint
from plrhf.training.plan import Machine, forecast, plan_table
from plrhf.training.processes import launched_processes, rank_shard_of, sharding_context
from plrhf.training.supervised import (
    begin,
    cached_tiny,
    check_backbone,
    load_options,
    open_backbone,
    train_supervised,
    trainer_of,
)
from plrhf.training.trainer import fit

PACKAGES = ("plrhf", "torch", "lightning", "transformers", "peft")
PARTS = ("data", "backbone", "encoder", "aggregator", "model", "optim")
KINDS: dict[str, Any] = {
    "seed": int,
    "run_dir": str,
    "cache_dir": str,
    "ckpt": Literal["last"] | None,
    "debug": bool,
    "plan": bool,
    **dict.fromkeys((*PARTS, "trainer", "logger", "samples", "plan_for"), dict[str, Any]),
}


def train(settings: Settings) -> None:
    """Run `settings` and leave everything in ``run_dir``; see docs/architecture.md for the files."""
    check_settings(settings)
    if settings["plan"]:
        print_plan(settings)
        return
    run_dir = Path(settings["run_dir"])
    resume_from = checkpoint_of(settings, run_dir)
    data = build_data(settings["data"])
    trainer = trainer_of(settings, data, run_dir)
    lightning.seed_everything(settings["seed"], verbose=False)
    if settings["model"]["name"] == "sft":
        train_supervised(settings, data, trainer, run_dir, resume_from=resume_from)
        if trainer.is_global_zero:
            print(f"supervised model: {run_dir / 'export'}")
    else:
        train_personal(settings, data, trainer, run_dir, resume_from=resume_from)


def check_settings(settings: Settings) -> None:
    """Refuse early, before data are read, what can be refused without them."""
    accepted(settings, KINDS, "")
    if not 0 <= settings["seed"] < 2**32:
        raise bad_value("seed", settings["seed"], "a whole number from 0 to 2^32 - 1", "Set seed=0")
    for name in ("run_dir", "cache_dir"):
        _check_writable(name, settings[name])
    check_backbone(settings["backbone"])
    _check_shards(settings)
    _check_attention(settings)
    build(settings["optim"], "optim")
    _samples(settings)
    _machine(settings)


def print_plan(settings: Settings) -> None:
    """Print what the run would need; weights are not read, and data only to count their users."""
    if settings["model"]["name"] == "sft":
        raise bad_value("plan", True, "false for model=sft", "Plan model=reward or model=dpo")
    machine = _machine(settings)
    if machine.users is None:
        data = build_data(settings["data"])
        n_users, schema = data.n_users, data.schema
    else:
        n_users, schema = machine.users, FeatureSchema(moments={}, codes={})
    plan = forecast(settings, n_users=n_users, schema=schema)
    tables.console().print(plan_table(plan, settings, machine))


def train_personal(
    settings: Settings,
    data: PreferenceData,
    trainer: Trainer,
    run_dir: Path,
    *,
    resume_from: Path | None,
) -> None:
    """Fit a reward model or a policy, evaluate its best checkpoint, export it and report."""
    optim: Optim = build(settings["optim"], "optim")
    path = settings["backbone"]["path"]
    if path is None:
        _rehearse(settings, data, optim)
        path = cached_tiny(settings, data)
    with launched_processes(trainer):
        data.set_shard(rank_shard_of(trainer))
        lightning.seed_everything(settings["seed"], verbose=False)
        tokenizer, backbone = open_backbone(
            settings["backbone"], path, shards=sharding_context(trainer)
        )
        card = make_card(settings, data, backbone, path)
        model: PersonalModule = build_model(backbone, card, optim=optim)
        cache_dir = Path(settings["cache_dir"])
        data.tokenize(
            tokenizer,
            causal=backbone.causal,
            max_positions=model.max_positions,
            cache_dir=cache_dir,
        )
        if isinstance(model, PersonalDPOPolicy):
            requested_rows(model, data, _samples(settings))
        probes = probe(data.splits)
        _warn(probes["warnings"])
        _say_padding(data.padding())
        begin(settings, run_dir, resume_from=resume_from)
        before = Prepare(data.restrict_to("train", "val"), cache_dir=cache_dir)
        trainer.callbacks.append(before)  # type: ignore[attr-defined]
        fit(model, data, trainer, resume_from=resume_from)
        save_export(run_dir / "export", model, card, tokenizer)
        prepare(model, data.restrict_to("test"), trainer, cache_dir=cache_dir)
        predictions = predict(model, data, trainer)
        ask = engine(model, trainer)
        ask(write_users, run_dir / "users.json", model, data)
        if isinstance(model, PersonalDPOPolicy):
            lightning.seed_everything(settings["seed"], verbose=False)  # all processes draw alike
            samples = _samples(settings)
            ask(write_generations, run_dir / "generations.jsonl", model, data, samples)
    conclude(settings, data, predictions, probes, run_dir)


@rank_zero_only
def conclude(
    settings: Settings,
    data: PreferenceData,
    predictions: pd.DataFrame,
    probes: Settings,
    run_dir: Path,
) -> None:
    """Write predictions, results and report, and show the table."""
    how = {"command": " ".join(["python", *sys.argv]), "versions": _versions()}
    results = summarise_run(predictions, settings, data, probes, how)
    write_evaluation(run_dir, results, predictions)
    report.write_report(run_dir)
    console = tables.console()
    console.print(tables.closing_table(results))
    console.print(f"report: {run_dir / 'report.html'}", soft_wrap=True)


@rank_zero_only
def _warn(lines: list[str]) -> None:
    for line in lines:
        print(f"warning: {line}")


@rank_zero_only
def _say_padding(share: float | None) -> None:
    if share is not None:
        print(f"padding: {100 * share:.1f}% of the tokens of train batches")


def _rehearse(settings: Settings, data: PreferenceData, optim: Optim) -> None:
    """Build the model on an untrained backbone: what is wrong shows before time goes into one."""
    node = settings["backbone"]
    backbone = Backbone(
        model=tiny_gptj(**node["tiny"], eos_token_id=0),
        trainable=node["trainable"],
        lora=node["lora"],
        gradient_checkpointing=node["gradient_checkpointing"],
    )
    card = make_card(settings, data, backbone, "")
    build_model(backbone, card, optim=optim)
    requested_users(card, _samples(settings))


def make_card(settings: Settings, data: PreferenceData, backbone: Backbone, path: str) -> Card:
    """What has to be known to build the run's model again."""
    local = Path(path)
    return Card(
        model=settings["model"],
        encoder=settings["encoder"],
        aggregator=settings["aggregator"],
        backbone={
            **load_options(settings["backbone"]),
            "path": str(local.resolve()) if local.is_dir() else path,
        },
        users=list(data.splits.users),
        features=data.schema.to_dict(),
        text=data.tokenizer_options,
        fingerprint=backbone.fingerprint(),
        precision=settings["trainer"]["precision"],
        ships_backbone=settings["backbone"]["path"] is None,
    )


def checkpoint_of(settings: Settings, run_dir: Path) -> Path | None:
    """The checkpoint to go on from, or None to begin.

    Raises:
        ValueError: there is none, or it was written under settings that no longer stand.
    """
    if settings["ckpt"] is None:
        return None
    path = run_dir / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise bad_value("ckpt", "last", f"a run that left {path}", "Set run_dir to that run's")
    before: Settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    ours, theirs = ({name: one[name] for name in ("seed", *PARTS)} for one in (settings, before))
    difference = first_difference(ours, theirs)
    if difference is not None:
        field, now, then = difference
        raise bad_value(
            field, now, f"{then!r}, which the run began with", "Repeat its command with ckpt=last"
        )
    read_checkpoint(path)
    return path


def _check_shards(settings: Settings) -> None:
    """Raise where several processes or sharded weights do not go with the other settings."""
    trainer, dtype = settings["trainer"], settings["backbone"]["dtype"]
    zero3, n_processes = trainer["zero3"], trainer["devices"] * trainer["num_nodes"]
    if settings["encoder"].get("sparse") is True and (zero3 is not None or n_processes > 1):
        raise bad_value(
            "encoder.sparse",
            True,
            "false with several processes or trainer.zero3, whose gradients are dense",
            "Set encoder.sparse=false",
        )
    if zero3 is None:
        return
    if settings["backbone"]["compiled"]:
        raise bad_value(
            "backbone.compiled",
            True,
            "false under trainer.zero3, which gathers weights layer by layer",
            "Set backbone.compiled=false",
        )
    names = {"32-true": "float32", "bf16-mixed": "bfloat16", "16-mixed": "float16"}
    wanted = names.get(trainer["precision"], dtype)
    if dtype != wanted:
        raise bad_value(
            "backbone.dtype",
            dtype,
            f"{wanted} under trainer.zero3 with trainer.precision={trainer['precision']}",
            f"Set backbone.dtype={wanted}",
        )


def _check_attention(settings: Settings) -> None:
    """Raise where torch has no backward pass for the attention asked for."""
    if settings["backbone"]["attention"] == FLEX and settings["trainer"]["accelerator"] == "cpu":
        raise bad_value(
            "backbone.attention",
            FLEX,
            "null, eager or sdpa with trainer.accelerator=cpu",
            "Set backbone.attention=null, or trainer=gpu",
        )


def _check_writable(field: str, path: str) -> None:
    there = next(one for one in (Path(path), *Path(path).absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        allowed = f"a directory that can be written, unlike {there}"
        raise bad_value(field, path, allowed, f"Set {field} to another")


def _samples(settings: Settings) -> GenerationOptions:
    target = f"{GenerationOptions.__module__}.{GenerationOptions.__qualname__}"
    return build({"_target_": target, **settings["samples"]}, "samples", origin="samples")


def _machine(settings: Settings) -> Machine:
    target = f"{Machine.__module__}.{Machine.__qualname__}"
    return build({"_target_": target, **settings["plan_for"]}, "plan_for")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
