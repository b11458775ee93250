"""Supervised fine-tuning as a run of its own, and as what a tiny backbone is made by before a run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import lightning
import yaml
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only

from plrhf.backbone.loading import Shards, check_path, load_backbone, load_tokenizer
from plrhf.backbone.model import Backbone, add_lora
from plrhf.backbone.tiny import tiny_gptj, train_tokenizer
from plrhf.core.checks import NonNegativeInt, PositiveFloat, PositiveInt, check_arguments
from plrhf.core.components import Settings, accepted, build, kinds
from plrhf.core.errors import bad_value
from plrhf.data.build import build_data
from plrhf.data.module import PreferenceData
from plrhf.data.rows import Row, content_hash
from plrhf.data.tokenizer import Tokenizer
from plrhf.models.optim import Optim
from plrhf.models.sft import SupervisedPolicy
from plrhf.training.loggers import build_loggers
from plrhf.training.processes import launched_processes, rank_shard_of, sharding_context
from plrhf.training.trainer import build_trainer, fit
from plrhf.training.zero import build_zero3


@check_arguments("backbone.sft")
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a backbone is fine-tuned, ``backbone.sft``.

    Args:
        responses: which responses of a pair are learned. max_steps: optimiser steps.
        batch_size: pairs a step. lr: learning rate at its peak. warmup_steps: steps up to the peak.
    """

    responses: Literal["chosen", "both"] = "chosen"
    max_steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    lr: PositiveFloat = 5e-5
    warmup_steps: NonNegativeInt = 100


def check_backbone(node: Settings) -> None:
    """Refuse settings of ``backbone`` by name and type before anything is loaded or trained."""
    own = {"path": str | None, "sft": dict[str, Any]}
    own |= dict.fromkeys(("architecture", "tiny"), dict[str, Any] | None)
    accepted(node, {**_of_backbone(), **kinds(load_tokenizer), **own}, "backbone")
    if node["lora"] is not None:
        accepted(node["lora"], _without(kinds(add_lora), "model"), "backbone.lora")
    build({"_target_": f"{__name__}.Recipe", **node["sft"]}, "backbone.sft")
    if node["path"] is None and node["tiny"] is None:
        raise bad_value("backbone.path", None, "a directory or hub name", "Set backbone.path=DIR")
    if node["tiny"] is not None:
        shape = accepted(node["tiny"], _without(kinds(tiny_gptj), "eos_token_id"), "backbone.tiny")
        for name, value in shape.items():
            if value < 1:
                raise bad_value(
                    f"backbone.tiny.{name}", value, "a whole number from 1", "Set a larger one"
                )


def open_backbone(
    node: Settings, path: str, *, shards: Shards | None = None
) -> tuple[Tokenizer, Backbone]:
    """Tokenizer and backbone at `path`, by the settings ``backbone``; `shards` as in `load_model`."""
    check_path(path)
    tokenizer = load_tokenizer(
        path, pad_token=node["pad_token"], trust_remote_code=node["trust_remote_code"]
    )
    target = f"{load_backbone.__module__}.{load_backbone.__qualname__}"
    return tokenizer, build(
        {"_target_": target, **load_options(node), "path": path}, "backbone", shards=shards
    )


def load_options(node: Settings) -> Settings:
    """Those settings of ``backbone`` that `load_backbone` takes."""
    return {name: value for name, value in node.items() if name in _of_backbone()}


def trainer_of(settings: Settings, data: PreferenceData, run_dir: Path) -> Trainer:
    """The trainer of ``trainer`` and ``logger``."""
    loggers = build(
        {"_target_": f"{build_loggers.__module__}.build_loggers", **settings["logger"]},
        "logger",
        run_dir=run_dir,
    )
    node = {name: value for name, value in settings["trainer"].items() if name != "zero3"}
    return build(
        {"_target_": f"{build_trainer.__module__}.build_trainer", **node},
        "trainer",
        zero3=build_zero3(settings["trainer"]["zero3"]),
        run_dir=run_dir,
        loggers=loggers,
        has_val=len(data.splits.val) > 0,
    )


@rank_zero_only
def begin(settings: Settings, run_dir: Path, *, resume_from: Path | None) -> None:
    """Make the run directory and write config.yaml; begun anew, an old run is no longer finished."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if resume_from is None:
        # Before there are new settings, which a kill would leave beside an old checkpoint.
        for name in ("results.json", "metrics.csv", "checkpoints/last.ckpt"):
            (run_dir / name).unlink(missing_ok=True)
    part = run_dir / "config.yaml.part"
    part.write_text(yaml.safe_dump(settings, sort_keys=False))
    os.replace(part, run_dir / "config.yaml")  # going on reads it: never half


def train_supervised(
    settings: Settings,
    data: PreferenceData,
    trainer: Trainer,
    run_dir: Path,
    *,
    resume_from: Path | None = None,
) -> None:
    """Fit a supervised policy and write it to ``export/`` as a Hugging Face model directory.

    Where ``backbone.path`` is null a tiny model with a tokenizer of its own is made first, and kept
    in the cache for runs on the same rows.
    """
    if settings["trainer"]["monitor"] != "val/loss":
        raise bad_value(
            "trainer.monitor",
            settings["trainer"]["monitor"],
            "val/loss, as model=sft has no accuracy",
            "Set trainer.monitor=val/loss",
        )
    node = settings["backbone"]
    optim: Optim = build(settings["optim"], "optim")
    with launched_processes(trainer):
        data.set_shard(rank_shard_of(trainer))
        if node["path"] is not None:
            tokenizer, backbone = open_backbone(
                node, node["path"], shards=sharding_context(trainer)
            )
        else:
            tokenizer, backbone = _fresh_tiny(node["tiny"], data)
        data.tokenize(
            tokenizer,
            causal=backbone.causal,
            max_positions=backbone.max_positions,
            cache_dir=Path(settings["cache_dir"]),
        )
        model = build(
            settings["model"], "model", kind=SupervisedPolicy, backbone=backbone, optim=optim
        )
        begin(settings, run_dir, resume_from=resume_from)
        fit(model, data, trainer, resume_from=resume_from)
        export = run_dir / "export"
        backbone.save_whole(export)
        if trainer.is_global_zero:
            tokenizer.save_pretrained(export)
            if node["path"] is None:
                _into_cache(export, cache_folder(settings, data))


def cached_tiny(settings: Settings, data: PreferenceData) -> str:
    """Where the run's tiny backbone lies, trained now where it does not lie there yet."""
    supervised = supervised_settings(settings)
    folder = cache_folder(supervised, data)
    if not folder.is_dir():
        steps = settings["backbone"]["sft"]["max_steps"]
        say = rank_zero_only(print)  # torchrun starts all processes before there is a backbone
        say(f"training the backbone first ({steps} steps), kept in {folder}")
        lightning.seed_everything(settings["seed"], verbose=False)
        with tempfile.TemporaryDirectory() as scratch:
            run_dir = Path(scratch)
            again = build_data(supervised["data"])
            train_supervised(supervised, again, trainer_of(supervised, again, run_dir), run_dir)
    return str(folder)


def supervised_settings(settings: Settings) -> Settings:
    """The settings ``model=sft`` would have had: those of ``backbone.sft``."""
    sft = settings["backbone"]["sft"]
    return {
        **settings,
        "model": {
            "name": "sft",
            "_target_": f"{SupervisedPolicy.__module__}.{SupervisedPolicy.__qualname__}",
            "responses": sft["responses"],
        },
        "data": {**settings["data"], "batch_size": sft["batch_size"], "batch_tokens": None},
        "optim": {
            **settings["optim"],
            "lr": sft["lr"],
            "warmup_steps": sft["warmup_steps"],
            "schedule": "cosine",
            "weight_decay": 0.0,
        },
        "trainer": {
            **settings["trainer"],
            **{"devices": 1, "num_nodes": 1, "zero3": None},  # made before other processes are
            "max_steps": sft["max_steps"],
            "max_epochs": None,
            "patience": None,
            "monitor": "val/loss",
            "val_every_n_steps": None,
            "checkpoint_every_n_steps": None,
            "accumulate_grad_batches": 1,
        },
        "logger": {"name": "csv"},
    }


def cache_folder(settings: Settings, data: PreferenceData) -> Path:
    """Named by all that decides the supervised model: texts, text options, shape, training, seed."""
    with_user_text = bool(data.tokenizer_options["use_user_text"])
    node, optim, trainer = settings["backbone"], settings["optim"], settings["trainer"]
    key = content_hash(
        _texts_hash(data.splits.train, with_user_text=with_user_text),
        _texts_hash(data.splits.val, with_user_text=with_user_text),
        data.tokenizer_options,
        node["tiny"],
        settings["model"]["responses"],
        settings["data"]["batch_size"],
        settings["seed"],
        [optim[name] for name in ("lr", "weight_decay", "warmup_steps", "schedule")],
        [
            trainer[name]
            for name in (
                *("max_steps", "max_epochs", "precision", "gradient_clip_val", "patience"),
                *("val_every_n_steps", "accumulate_grad_batches", "monitor"),
            )
        ],
    )
    return Path(settings["cache_dir"]).resolve() / f"tiny_gptj-{key}"


def _texts_hash(rows: Sequence[Row], *, with_user_text: bool) -> str:
    """A hash of the texts that a language model is trained on, one row at a time."""
    digest = blake2b(digest_size=8)
    for row in rows:
        own = row.user_text if with_user_text else None
        digest.update(content_hash(str(row.prompt), row.chosen, row.rejected, own).encode())
    return digest.hexdigest()


def _fresh_tiny(shape: Settings, data: PreferenceData) -> tuple[Tokenizer, Backbone]:
    rows = data.splits.train
    texts = (text for row in rows for text in (str(row.prompt), row.chosen, row.rejected))
    tokenizer = train_tokenizer(texts, vocab_size=shape["vocab_size"])
    shape = {**shape, "vocab_size": len(tokenizer)}
    model = tiny_gptj(eos_token_id=tokenizer.eos_token_id, **shape)
    return tokenizer, Backbone(model=model, trainable="full")


def _into_cache(export: Path, folder: Path) -> None:
    """Copy so that no reader ever sees half a model, and of two processes one is as good as both."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = shutil.copytree(export, Path(scratch, folder.name))
        try:
            os.rename(whole, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first with the same model
                raise


def _of_backbone() -> dict[str, Any]:
    """The settings of ``backbone`` that `load_backbone` takes; shards are the trainer's."""
    return _without(kinds(load_backbone), "shards")


def _without(names: dict[str, Any], *left_out: str) -> dict[str, Any]:
    return {name: value for name, value in names.items() if name not in left_out}
