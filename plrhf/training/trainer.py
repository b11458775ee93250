"""The Lightning trainer of a run.

Several processes use torch's DDP, where each holds the whole model, or ZeRO-3 (`zero.py`), where each
holds a shard.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from rich.console import Console
from torch.utils.data import DataLoader

from plrhf.core.checks import PositiveFloat, PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.core.monitor import Monitor, higher_is_better
from plrhf.data.module import PreferenceData
from plrhf.training.checkpoints import AtomicCheckpointIO, LastCheckpoint, ResumeState, load_best
from plrhf.training.loggers import StepMetrics
from plrhf.training.progress import RunProgressBar, TrainingLines
from plrhf.training.zero import Stage3, Zero3, stage3

MaxSteps = Literal[-1] | PositiveInt


@check_arguments("trainer")
def build_trainer(
    *,
    run_dir: Path,
    loggers: list[Logger],
    has_val: bool,
    monitor: Monitor = "val/loss",
    patience: PositiveInt | None = None,
    checkpoint_every_n_steps: PositiveInt | None = None,
    val_every_n_steps: PositiveInt | None = None,
    max_epochs: PositiveInt | None = None,
    max_steps: MaxSteps = -1,
    accelerator: str = "auto",
    devices: PositiveInt = 1,
    num_nodes: PositiveInt = 1,
    zero3: Zero3 | None = None,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    matmul_precision: Literal["highest", "high", "medium"] = "highest",
    accumulate_grad_batches: PositiveInt = 1,
    gradient_clip_val: PositiveFloat | None = None,
    log_every_n_steps: PositiveInt = 10,
    progress: bool = True,
) -> Trainer:
    """Build a trainer that keeps the best checkpoint by `monitor`, and the last one.

    Args:
        run_dir: checkpoints go to its ``checkpoints/``.
        loggers: from `build_loggers`.
        has_val: whether there are val pairs; without them the final weights are the best.
        monitor: a logged val metric, see `higher_is_better`.
        patience: validations without progress before training stops; None: never stop early.
        checkpoint_every_n_steps: also write last.ckpt every so many steps.
        val_every_n_steps: validate every so many steps; None: once an epoch.
        max_epochs, max_steps: training ends at whichever comes first; -1 steps: no limit.
        devices, num_nodes: processes on each node, and nodes.
        zero3: shards weights, gradients and optimiser over all processes; None: each process holds them
            whole, and several processes average their gradients (DDP).
        matmul_precision: of float32 products on GPUs, see torch.set_float32_matmul_precision.
        progress: show a progress bar on a terminal, and a line every minute elsewhere.
        others: as in `lightning.Trainer`.

    Raises:
        ValueError: a number out of range, no end of training, or a device that this machine lacks.
    """
    _check_end(max_epochs=max_epochs, max_steps=max_steps)
    _check_patience(patience, has_val=has_val)
    shows_progress = progress and Console().is_terminal
    callbacks = _callbacks(
        run_dir / "checkpoints",
        monitor=monitor if has_val else None,
        patience=patience,
        every_n_steps=checkpoint_every_n_steps,
        log_every_n_steps=log_every_n_steps,
    )
    if progress:
        callbacks.append(RunProgressBar() if shows_progress else TrainingLines())
    strategy = _strategy(
        zero3,
        n_processes=devices * num_nodes,
        on_cpu=accelerator == "cpu",
        accumulate_grad_batches=accumulate_grad_batches,
        gradient_clip_val=gradient_clip_val,
    )
    n_summed = accumulate_grad_batches
    val_every_n_batches = None if val_every_n_steps is None else val_every_n_steps * n_summed
    with _device_errors_named(accelerator):
        trainer = Trainer(
            default_root_dir=run_dir,
            logger=loggers,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            max_epochs=max_epochs,
            max_steps=max_steps,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            use_distributed_sampler=False,  # the data module shards each batch itself
            precision=precision,
            accumulate_grad_batches=n_summed,
            gradient_clip_val=gradient_clip_val,
            enable_progress_bar=shows_progress,
            val_check_interval=1.0 if val_every_n_batches is None else val_every_n_batches,
            check_val_every_n_epoch=1 if val_every_n_batches is None else None,
            limit_val_batches=1.0 if has_val else 0,
            num_sanity_val_steps=0,
            enable_model_summary=False,
        )
    if trainer.strategy.root_device.type == "cuda":
        torch.set_float32_matmul_precision(matmul_precision)
    return trainer


def _check_end(*, max_epochs: int | None, max_steps: int) -> None:
    """Raise a ValueError if neither epochs nor steps limit training."""
    if max_epochs is None and max_steps == -1:
        allowed = "a number of steps, or trainer.max_epochs"
        raise bad_value("trainer.max_steps", -1, allowed, "Set trainer.max_steps=1000")


def _check_patience(patience: int | None, *, has_val: bool) -> None:
    """Raise a ValueError if early stopping is asked for without val pairs."""
    if patience is not None and not has_val:
        raise bad_value(
            "trainer.patience", patience, "null without val pairs", "Set trainer.patience=null"
        )


@contextlib.contextmanager
def _device_errors_named(accelerator: str) -> Iterator[None]:
    """Turn Lightning's error for a missing device into one that names the setting, in this context."""
    try:
        yield
    except MisconfigurationException as error:
        raise bad_value(
            "trainer.accelerator",
            accelerator,
            "a device this machine has, or auto",
            f"Set trainer=cpu ({' '.join(str(error).split())})",
        ) from error


def _strategy(
    zero3: Zero3 | None,
    *,
    n_processes: int,
    on_cpu: bool,
    accumulate_grad_batches: int,
    gradient_clip_val: float | None,
) -> Strategy | str:
    """Return Lightning's strategy for these processes."""
    if zero3 is not None:
        return stage3(
            zero3,
            on_cpu=on_cpu,
            accumulate_grad_batches=accumulate_grad_batches,
            gradient_clip_val=gradient_clip_val,
        )
    if n_processes == 1:
        return "auto"
    return DDPStrategy(
        # Some weights get no gradient, such as a reward model's language head. static_graph=True
        # would find them once and for all, but fails where gradients of several batches are summed.
        find_unused_parameters=True,
        gradient_as_bucket_view=True,  # else gradients are held twice
    )


def _callbacks(
    folder: Path,
    *,
    monitor: Monitor | None,
    patience: int | None,
    every_n_steps: int | None,
    log_every_n_steps: int,
) -> list[Callback]:
    """Return the callbacks in the order in which they must run."""
    callbacks: list[Callback] = [ResumeState(), StepMetrics(log_every_n_steps)]
    if monitor is not None:
        mode = "max" if higher_is_better(monitor) else "min"
        if patience is not None:
            callbacks.append(
                EarlyStopping(
                    monitor=monitor, mode=mode, patience=patience, check_on_train_epoch_end=False
                )
            )
        callbacks.append(
            ModelCheckpoint(
                folder,
                filename="best",
                monitor=monitor,
                mode=mode,
                enable_version_counter=False,
                save_on_train_epoch_end=False,
            )
        )
    # The last checkpoint holds the state of the other two, so it is written after them.
    return [*callbacks, LastCheckpoint(folder / "last.ckpt", every_n_steps=every_n_steps)]


def _check_accumulation(data: PreferenceData, trainer: Trainer) -> None:
    """Raise a ValueError if an epoch ends between accumulated batches, where DeepSpeed takes no step."""
    accumulated_batches = trainer.accumulate_grad_batches
    if accumulated_batches > 1 and isinstance(trainer.strategy, Stage3):
        n_batches = len(data.train_dataloader())
        if n_batches % accumulated_batches != 0:
            raise bad_value(
                "trainer.accumulate_grad_batches",
                accumulated_batches,
                f"a divisor of the {n_batches} batches of an epoch under trainer.zero3",
                "Set it to 1, or change data.batch_size",
            )


class TrainingData(LightningDataModule):
    """Gives the trainer the train and val batches of `data`."""

    def __init__(self, data: PreferenceData) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> DataLoader:
        return self.data.train_dataloader()

    def val_dataloader(self) -> DataLoader:
        return self.data.val_dataloader()


def fit(
    model: LightningModule, data: PreferenceData, trainer: Trainer, *, resume_from: Path | None
) -> None:
    """Train the model, from the start or from a checkpoint, and load its best weights.

    Lightning gets only train and val pairs, so nothing that trains or selects can read test pairs.

    Raises:
        SystemExit: SIGTERM came, with the status of a process that it ended; Lightning's own would be 0.
    """
    _check_accumulation(data, trainer)
    model.train()  # from_pretrained leaves models in eval mode
    open_data = TrainingData(data.restrict_to("train", "val"))
    try:
        trainer.fit(model, datamodule=open_data, ckpt_path=resume_from, weights_only=True)
    except SIGTERMException as stopped:
        if trainer.is_global_zero:
            print(
                f"stopped by SIGTERM after step {trainer.global_step}: ckpt=last goes on",
                flush=True,
            )
        raise SystemExit(128 + signal.SIGTERM) from stopped
    load_best(trainer)
