"""One run: build, seed, fit, evaluate, write the run directory."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import lightning
import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from rich.console import Console

from plrhf import report
from plrhf.backbone import Backbone, load_backbone, load_tokenizer, tiny_gptj, train_tokenizer
from plrhf.cli import Settings, main
from plrhf.config import build, parameters
from plrhf.data.module import PreferenceData, build_data
from plrhf.data.packing import Tokenizer
from plrhf.data.rows import content_hash
from plrhf.errors import bad_value
from plrhf.evaluate import predict, prepare, summarise_run, write_evaluation, write_texts
from plrhf.export import Card, build_model, save_export
from plrhf.personal import PersonalModule
from plrhf.policy import PersonalDPOPolicy
from plrhf.sft import SupervisedPolicy
from plrhf.training import build_trainer

PACKAGES = ("plrhf", "torch", "lightning", "transformers", "peft")


def train_main() -> None:
    """Entry point of train.py."""
    main("train", train)


def train(settings: Settings) -> None:
    """Run `settings` and leave everything in ``run_dir``; see docs/architecture.md for the files."""
    run_dir = Path(settings["run_dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    _write_config(settings, run_dir)
    lightning.seed_everything(settings["seed"], verbose=False)
    data = build_data(settings["data"])
    if settings["model"]["name"] == "sft":
        train_supervised(settings, data, run_dir)
    else:
        train_personal(settings, data, run_dir)


def train_personal(settings: Settings, data: PreferenceData, run_dir: Path) -> None:
    """Fit a reward model or a policy, evaluate its best checkpoint, export it and report."""
    path = backbone_path(settings, data)
    lightning.seed_everything(settings["seed"], verbose=False)
    tokenizer = load_tokenizer(path, **_tokenizer_options(settings["backbone"]))
    backbone = load_backbone(**{**_load_options(settings["backbone"]), "path": path})
    data.tokenize(tokenizer, causal=backbone.causal, max_positions=backbone.max_positions)
    card = make_card(settings, data, path)
    model: PersonalModule = build_model(backbone, card, optim=build(settings["optim"], "optim"))
    model.card = card
    trainer = _trainer(settings, data, run_dir)
    prepare(model, data, trainer)
    trainer.fit(
        model, datamodule=data, ckpt_path=_resume_from(settings, run_dir), weights_only=True
    )
    if trainer.interrupted:
        sys.exit(130)
    load_best(model, trainer)
    save_export(run_dir / "export", model, card, tokenizer)
    predictions = predict(model, data, trainer)
    how = {"command": " ".join(["python", *sys.argv]), "versions": _versions()}
    results = summarise_run(predictions, settings, data, how)
    write_evaluation(run_dir, results, predictions)
    if isinstance(model, PersonalDPOPolicy):
        write_texts(run_dir / "generations.jsonl", model, data, **settings["samples"])
    report.write_report(run_dir)
    console = Console()
    console.print(report.closing_table(results))
    console.print(f"report: {run_dir / 'report.html'}", soft_wrap=True)


def train_supervised(settings: Settings, data: PreferenceData, run_dir: Path) -> None:
    """Fit a supervised policy and write it to ``export/`` as a Hugging Face model directory.

    Where ``backbone.path`` is null a tiny model with a tokenizer of its own is made first, and kept
    in the cache for runs on the same rows.
    """
    node = settings["backbone"]
    if node["path"] is not None:
        tokenizer = load_tokenizer(node["path"], **_tokenizer_options(node))
        backbone = load_backbone(**_load_options(node))
    else:
        tokenizer, backbone = _fresh_tiny(node["tiny"], data)
    data.tokenize(tokenizer, causal=backbone.causal, max_positions=backbone.max_positions)
    model = SupervisedPolicy(
        backbone=backbone,
        optim=build(settings["optim"], "optim"),
        responses=settings["model"]["responses"],
    )
    trainer = _trainer(settings, data, run_dir)
    trainer.fit(
        model, datamodule=data, ckpt_path=_resume_from(settings, run_dir), weights_only=True
    )
    if trainer.interrupted:
        sys.exit(130)
    export = run_dir / "export"
    backbone.merged().save_pretrained(export)
    tokenizer.save_pretrained(export)
    if node["path"] is None:
        _into_cache(export, _cache_folder(settings, data))
    print(f"supervised model: {export}")


def backbone_path(settings: Settings, data: PreferenceData) -> str:
    """Where the run's backbone lies, training and caching the tiny one where it does not yet.

    Raises:
        ValueError: neither a path nor the shape of a tiny model is given.
    """
    node = settings["backbone"]
    if node["path"] is not None:
        return node["path"]
    if node["tiny"] is None:
        raise bad_value("backbone.path", None, "a directory or hub name", "Set backbone.path=DIR")
    supervised = supervised_settings(settings)
    folder = _cache_folder(supervised, data)
    if not folder.is_dir():
        print(f"training the backbone first ({node['sft']['max_steps']} steps), kept in {folder}")
        data_now = build_data(supervised["data"])
        lightning.seed_everything(settings["seed"], verbose=False)
        with tempfile.TemporaryDirectory() as scratch:
            train_supervised(supervised, data_now, Path(scratch))
    return str(folder)


def supervised_settings(settings: Settings) -> Settings:
    """The settings ``model=sft`` would have had: those of ``backbone.sft``."""
    sft = settings["backbone"]["sft"]
    return {
        **settings,
        "model": {"name": "sft", "responses": sft["responses"]},
        "data": {**settings["data"], "batch_size": sft["batch_size"]},
        "optim": {
            **settings["optim"],
            "lr": sft["lr"],
            "warmup_steps": sft["warmup_steps"],
            "schedule": "cosine",
            "weight_decay": 0.0,
        },
        "trainer": {
            **settings["trainer"],
            "max_steps": sft["max_steps"],
            "max_epochs": None,
            "patience": None,
            "monitor": "val/loss",
            "val_every_n_steps": None,
            "checkpoint_every_n_steps": None,
            "accumulate_grad_batches": 1,
        },
        "ckpt": None,
    }


def make_card(settings: Settings, data: PreferenceData, path: str) -> Card:
    """What has to be known to build the run's model again."""
    local = Path(path)
    return Card(
        model=settings["model"],
        encoder=settings["encoder"],
        aggregator=settings["aggregator"],
        backbone={
            **_load_options(settings["backbone"]),
            "path": str(local.resolve()) if local.is_dir() else path,
        },
        users=list(data.splits.users),
        features=data.schema.to_dict(),
        text=data.tokenizer_options,
    )


def load_best(model: LightningModule, trainer: Trainer) -> None:
    """Put the weights of the best checkpoint, chosen on val, into the model."""
    best = next(
        (
            c.best_model_path
            for c in trainer.checkpoint_callbacks
            if isinstance(c, ModelCheckpoint) and c.monitor is not None
        ),
        "",
    )
    if best != "":
        state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict(state, strict=False)


def _trainer(settings: Settings, data: PreferenceData, run_dir: Path) -> Trainer:
    target = f"{build_trainer.__module__}.{build_trainer.__qualname__}"
    return build(
        {"_target_": target, **settings["trainer"]},
        "trainer",
        run_dir=run_dir,
        loggers=_loggers(settings["logger"], run_dir),
        has_val=len(data.splits.val) > 0,
    )


def _loggers(node: Settings, run_dir: Path) -> list[Logger]:
    """metrics.csv always, TensorBoard and W&B where asked for."""
    loggers: list[Logger] = [CSVLogger(run_dir, name="", version="")]
    if node["tensorboard"]:
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    if node["wandb"] is not None:
        loggers.append(WandbLogger(save_dir=run_dir, **node["wandb"]))
    return loggers


def _resume_from(settings: Settings, run_dir: Path) -> str | None:
    if settings["ckpt"] is None:
        return None
    path = run_dir / "checkpoints" / "last.ckpt"
    if settings["ckpt"] != "last":
        raise bad_value("ckpt", settings["ckpt"], "last or null", "Set ckpt=last run_dir=DIR")
    if not path.is_file():
        raise bad_value(
            "ckpt", "last", f"a run with {path}", "Set run_dir to the run to go on with"
        )
    return str(path)


def _fresh_tiny(shape: Settings, data: PreferenceData) -> tuple[Tokenizer, Backbone]:
    rows = data.splits.train
    texts = [text for row in rows for text in (str(row.prompt), row.chosen, row.rejected)]
    tokenizer = train_tokenizer(texts, vocab_size=shape["vocab_size"])
    rest = {name: value for name, value in shape.items() if name != "vocab_size"}
    model = tiny_gptj(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **rest)
    return tokenizer, Backbone(model=model, trainable="full")


def _cache_folder(settings: Settings, data: PreferenceData) -> Path:
    """Named by all that decides the supervised model: rows, text options, shape, training, seed."""
    texts = sorted({(str(r.prompt), r.chosen, r.rejected) for r in data.splits.train})
    node = settings["backbone"]
    optim, trainer = settings["optim"], settings["trainer"]
    key = content_hash(
        texts,
        data.tokenizer_options,
        node["tiny"],
        settings["model"]["responses"],
        settings["data"]["batch_size"],
        settings["seed"],
        [optim[name] for name in ("lr", "weight_decay", "warmup_steps", "schedule")],
        [trainer[name] for name in ("max_steps", "max_epochs", "precision", "gradient_clip_val")],
    )
    return Path(settings["cache_dir"]).resolve() / f"tiny_gptj-{key}"


def _into_cache(export: Path, folder: Path) -> None:
    """Copy so that no reader ever sees half a model: a kill leaves the old or the whole new one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    shutil.copytree(export, scratch, dirs_exist_ok=True)
    if folder.is_dir():
        shutil.rmtree(scratch)
    else:
        os.replace(scratch, folder)


def _load_options(node: Settings) -> Settings:
    return {name: value for name, value in node.items() if name in parameters(load_backbone)}


def _tokenizer_options(node: Settings) -> Settings:
    return {"pad_token": node["pad_token"], "trust_remote_code": node["trust_remote_code"]}


def _write_config(settings: Settings, run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
