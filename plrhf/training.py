"""The Lightning trainer of a run: what it watches, when it stops, and how it goes on after a kill."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import Logger

from plrhf.errors import bad_value


class RandomState(Callback):
    """Puts the random generators into checkpoints and back, so that dropout goes on as it would have."""

    def __init__(self) -> None:
        self.restored: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        checkpoint["random_state"] = {
            "python": random.getstate(),
            "numpy": (kind, np.asarray(keys).tolist(), position, has_gauss, cached),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.restored = checkpoint["random_state"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.restored is None:
            return
        random.setstate(self.restored["python"])
        kind, keys, position, has_gauss, cached = self.restored["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(self.restored["torch"])
        if len(self.restored["cuda"]) > 0:
            torch.cuda.set_rng_state_all(self.restored["cuda"])


def build_trainer(
    *,
    run_dir: Path,
    loggers: list[Logger],
    has_val: bool,
    monitor: str = "val/loss",
    patience: int | None = None,
    checkpoint_every_n_steps: int | None = None,
    val_every_n_steps: int | None = None,
    max_epochs: int | None = None,
    max_steps: int = -1,
    accelerator: str = "auto",
    devices: int | str = 1,
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true",
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    log_every_n_steps: int = 10,
    progress: bool = True,
) -> Trainer:
    """A trainer that keeps the best checkpoint by `monitor` and the last, and stops early if asked.

    Args:
        run_dir: checkpoints go to its ``checkpoints/``.
        has_val: whether there are val pairs; without them the last checkpoint is the best.
        monitor: a logged val metric, lower is better unless it is an accuracy.
        patience: validations without progress before stopping, None never.
        checkpoint_every_n_steps: how much a kill may cost; None: at each validation only.
        val_every_n_steps: validate every so many steps, None once an epoch.
        others: as in `lightning.Trainer`.
    """
    if max_epochs is None and max_steps == -1:
        raise bad_value(
            "trainer.max_steps",
            max_steps,
            "a number of steps, or trainer.max_epochs",
            "Set trainer.max_steps=1000",
        )
    for name, value in (
        ("accumulate_grad_batches", accumulate_grad_batches),
        ("log_every_n_steps", log_every_n_steps),
    ):
        if value < 1:
            raise bad_value(
                f"trainer.{name}", value, "a whole number from 1", f"Set trainer.{name}=1"
            )
    mode = "max" if "accuracy" in monitor else "min"
    folder = run_dir / "checkpoints"
    callbacks: list[Callback] = [RandomState()]
    if has_val:
        callbacks.append(
            ModelCheckpoint(
                folder, filename="best", monitor=monitor, mode=mode, enable_version_counter=False
            )
        )
        if patience is not None:
            callbacks.append(EarlyStopping(monitor=monitor, mode=mode, patience=patience))
    callbacks.append(
        ModelCheckpoint(
            folder,
            filename="last",
            monitor=None,
            enable_version_counter=False,
            every_n_train_steps=checkpoint_every_n_steps,
        )
    )
    if progress:
        callbacks.append(RichProgressBar(leave=False))
    return Trainer(
        default_root_dir=run_dir,
        logger=loggers,
        callbacks=callbacks,
        max_epochs=max_epochs,
        max_steps=max_steps,
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        accumulate_grad_batches=accumulate_grad_batches,
        gradient_clip_val=gradient_clip_val,
        log_every_n_steps=log_every_n_steps,
        enable_progress_bar=progress,
        val_check_interval=1.0 if val_every_n_steps is None else val_every_n_steps,
        check_val_every_n_epoch=1 if val_every_n_steps is None else None,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
