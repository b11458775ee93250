"""Supervised fine-tuning: model=sft, and the tiny backbone that is trained before other runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

import lightning
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only

from plrhf.backbone.loading import PLAIN_CHAT
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj, train_tokenizer
from plrhf.cli.assemble import build_run_trainer, open_backbone
from plrhf.cli.config import LoggerConfig, RunConfig, TinyShape
from plrhf.cli.rows import build_data
from plrhf.cli.run_dir import Resume, begin_run
from plrhf.core.components import build
from plrhf.core.errors import bad_value
from plrhf.core.files import temporary_folder
from plrhf.data.digests import content_hash, is_intact, seal_folder
from plrhf.data.module import PreferenceData
from plrhf.data.rows import Row
from plrhf.data.tokenizer import Tokenizer
from plrhf.models.sft import SupervisedPolicy
from plrhf.training.loggers import log_files, log_results, log_settings
from plrhf.training.processes import launched_processes, rank_shard_of, sharding_context
from plrhf.training.trainer import fit

COMPUTATION = 1
"""Version of the computation. Increase it when a code change gives another backbone for the same rows
and settings."""

LIBRARIES = ("torch", "transformers", "tokenizers", "lightning")
"""Libraries whose versions affect fine-tuning."""

WITHOUT_EFFECT = {
    "name",
    "devices",  # the total batch is the same whatever the number of processes
    "num_nodes",
    "zero3",
    "checkpoint_every_n_steps",
    "log_every_n_steps",
    "progress",
}
"""Settings of the trainer that do not affect the fine-tuned weights."""


def train_supervised(
    config: RunConfig, data: PreferenceData, trainer: Trainer, *, resume: Resume | None = None
) -> None:
    """Fine-tune a backbone and write it to ``export/`` as a Hugging Face model directory.

    If ``backbone.path`` is null, a tiny model and its tokenizer are created first, and the result is
    cached for other runs on the same rows.
    """
    if config.trainer.monitor != "val/loss":
        raise bad_value(
            "trainer.monitor",
            config.trainer.monitor,
            "val/loss, as model=sft has no accuracy",
            "Set trainer.monitor=val/loss",
        )
    path = config.backbone.path
    with launched_processes(trainer):
        data.set_shard(rank_shard_of(trainer))
        if path is not None:
            tokenizer, backbone = open_backbone(
                config.backbone, path, shards=sharding_context(trainer)
            )
        else:
            assert config.backbone.tiny is not None
            tokenizer, backbone = _new_tiny_backbone(config.backbone.tiny, data)
        # Before rows that are too long are left out, which the tokenizer is needed for.
        folder = cache_folder(config, data) if path is None else None
        data.tokenize(
            tokenizer,
            layout=backbone.layout,
            max_positions=backbone.max_positions,
            cache_dir=Path(config.cache_dir),
        )
        model = build(
            config.model, "model", kind=SupervisedPolicy, backbone=backbone, optim=config.optim
        )
        begin_run(config, resume=resume)
        log_settings(trainer.loggers, config.resolved)
        fit(model, data, trainer, resume_from=None if resume is None else resume.path)
        if trainer.is_global_zero:
            log_results(trainer.loggers, config.resolved, {}, trainer.global_step)
            log_files(trainer.loggers, [])
        export = Path(config.run_dir) / "export"
        backbone.save_whole(export)
        if trainer.is_global_zero:
            tokenizer.save_pretrained(export)
            if folder is not None:
                _copy_into_cache(export, folder)


def cached_tiny_backbone(config: RunConfig, data: PreferenceData) -> str:
    """Return the directory of the run's tiny backbone; train it first if it is not in the cache."""
    with tempfile.TemporaryDirectory() as scratch:
        supervised = supervised_config(config, run_dir=scratch)
        folder = cache_folder(supervised, data)
        say = rank_zero_only(print)  # torchrun starts all processes before there is a backbone
        if folder.is_dir() and not is_intact(folder):
            say(f"damaged, and made anew: {folder}")
            shutil.rmtree(folder, ignore_errors=True)
        if not folder.is_dir():
            steps = config.backbone.sft.max_steps
            say(f"training the backbone first (at most {steps} steps), kept in {folder}")
            lightning.seed_everything(config.seed, verbose=False)
            again = build_data(supervised.data)
            has_val = len(again.splits.val) > 0
            trainer = build_run_trainer(supervised, Path(scratch), has_val=has_val)
            train_supervised(supervised, again, trainer)
    return str(folder)


def supervised_config(config: RunConfig, *, run_dir: str) -> RunConfig:
    """Return the config of the ``model=sft`` run that ``backbone.sft`` describes."""
    sft = config.backbone.sft
    trainer = config.trainer.model_copy(
        update={
            **{"devices": 1, "num_nodes": 1, "zero3": None},  # made before other processes are
            "max_steps": sft.max_steps,
            "max_epochs": sft.max_epochs,
            "patience": sft.patience,
            "monitor": "val/loss",
            "val_every_n_steps": None,
            "checkpoint_every_n_steps": None,
            "accumulate_grad_batches": 1,
        }
    )
    model = {
        "name": "sft",
        "_target_": f"{SupervisedPolicy.__module__}.{SupervisedPolicy.__qualname__}",
        "responses": sft.responses,
    }
    return config.model_copy(
        update={
            "run_dir": run_dir,
            "model": model,
            "data": config.data.model_copy(
                update={"batch_size": sft.batch_size, "batch_tokens": None}
            ),
            "optim": replace(
                config.optim,
                lr=sft.lr,
                warmup_steps=sft.warmup_steps,
                schedule="cosine",
                weight_decay=0.0,
            ),
            "trainer": trainer,
            "logger": LoggerConfig(name="csv"),
        }
    )


def cache_folder(config: RunConfig, data: PreferenceData) -> Path:
    """Return where a fine-tuned tiny backbone is cached, named by a hash of all that affects it."""
    said = {"text": config.data.use_user_text, "features": config.data.use_user_features}
    language_model = asdict(config.optim)
    for name in ("user_lr", "head_lr", "user_weight_decay"):  # of models on top of it
        del language_model[name]
    assert config.backbone.tiny is not None
    key = content_hash(
        COMPUTATION,
        [version(name) for name in LIBRARIES],
        _texts_hash(data.splits.train, **said),
        _texts_hash(data.splits.val, **said),
        data.tokenizer_options,
        config.backbone.tiny.model_dump(),
        config.model["responses"],
        [config.seed, config.data.seed],
        [config.data.batch_size, config.data.batch_tokens, config.data.eval_batch_size],
        language_model,
        config.trainer.model_dump(exclude=WITHOUT_EFFECT),
    )
    return Path(config.cache_dir).resolve() / f"tiny_gptj-{key}"


def _texts_hash(rows: Sequence[Row], *, text: bool, features: bool) -> str:
    """Hash the texts that a language model is trained on, and the users' text and features it reads."""
    digest = blake2b(digest_size=8)
    for row in rows:
        own = [row.user_text if text else None, row.user_features if features else None]
        digest.update(content_hash(str(row.prompt), row.chosen, row.rejected, own).encode())
    return digest.hexdigest()


def _new_tiny_backbone(shape: TinyShape, data: PreferenceData) -> tuple[Tokenizer, Backbone]:
    """Train a tokenizer on the train rows, and build a randomly initialised GPT-J with its vocabulary."""
    rows = data.splits.train
    texts = (text for row in rows for text in (str(row.prompt), row.chosen, row.rejected))
    tokenizer = train_tokenizer(texts, vocab_size=shape.vocab_size)
    if any(not isinstance(row.prompt, str) for row in rows):
        tokenizer.chat_template = PLAIN_CHAT
    found = {**shape.model_dump(), "vocab_size": len(tokenizer)}
    model = tiny_gptj(eos_token_id=tokenizer.eos_token_id, **found)
    return tokenizer, Backbone(model=model, trainable="full")


def _copy_into_cache(export: Path, folder: Path) -> None:
    """Copy a model into the cache, in two steps so that no process reads half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent, folder.name) as whole:
        shutil.copytree(export, whole, dirs_exist_ok=True)
        seal_folder(whole)
        try:
            os.rename(whole, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first with the same model
                raise
