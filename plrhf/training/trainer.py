"""The Lightning trainer of a run: what it watches, and when it stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from plrhf.core.components import build
from plrhf.core.errors import bad_value
from plrhf.data.module import PreferenceData
from plrhf.training.checkpoints import AtomicCheckpointIO, LastCheckpoint, ResumeState, load_best
from plrhf.training.loggers import StepMetrics
from plrhf.training.zero import Stage3, Zero3, stage3

Monitor = Literal["val/loss", "val/accuracy_micro", "val/accuracy_macro", "val/nll"]


def build_trainer(
    *,
    run_dir: Path,
    loggers: list[Logger],
    has_val: bool,
    monitor: Monitor = "val/loss",
    patience: int | None = None,
    checkpoint_every_n_steps: int | None = None,
    val_every_n_steps: int | None = None,
    max_epochs: int | None = None,
    max_steps: int = -1,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    zero3: dict[str, Any] | None = None,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    log_every_n_steps: int = 10,
    progress: bool = True,
) -> Trainer:
    """A trainer that keeps the best checkpoint by `monitor` and the last.

    Args:
        run_dir: checkpoints go to its ``checkpoints/``.
        has_val: whether there are val pairs; without them the final weights are the best.
        monitor: a logged val metric, lower is better unless it is an accuracy.
        patience: validations without progress before stopping, None never.
        checkpoint_every_n_steps: how much a kill may cost; None: what lies between validations.
        val_every_n_steps: validate every so many steps, None once an epoch.
        max_epochs, max_steps: where training ends, whichever comes first; -1 steps: no limit.
        devices, num_nodes: processes a node and nodes; more than one process needs zero3.
        zero3: settings of `plrhf.training.zero.Zero3`; None: one process without DeepSpeed.
        progress: show a progress bar where there is a terminal.
        others: as in `lightning.Trainer`.

    Raises:
        ValueError: a number out of range, no end to training, or a device this machine lacks.
    """
    _check_ranges(
        max_epochs=max_epochs,
        max_steps=None if max_steps == -1 else max_steps,
        patience=patience,
        checkpoint_every_n_steps=checkpoint_every_n_steps,
        val_every_n_steps=val_every_n_steps,
        accumulate_grad_batches=accumulate_grad_batches,
        log_every_n_steps=log_every_n_steps,
        devices=devices,
        num_nodes=num_nodes,
    )
    check_devices(devices=devices, num_nodes=num_nodes, zero3=zero3)
    if gradient_clip_val is not None and not gradient_clip_val > 0:
        raise bad_value(
            "trainer.gradient_clip_val",
            gradient_clip_val,
            "a number above 0, or null",
            "Set trainer.gradient_clip_val=1.0",
        )
    if patience is not None and not has_val:
        raise bad_value(
            "trainer.patience", patience, "null without val pairs", "Set trainer.patience=null"
        )
    val_every_n_batches = (
        None if val_every_n_steps is None else val_every_n_steps * accumulate_grad_batches
    )
    try:
        return Trainer(
            default_root_dir=run_dir,
            logger=loggers,
            callbacks=_callbacks(
                run_dir / "checkpoints",
                monitor=monitor if has_val else None,
                patience=patience,
                every_n_steps=checkpoint_every_n_steps,
                log_every_n_steps=log_every_n_steps,
            )
            + ([RichProgressBar(leave=False)] if progress and Console().is_terminal else []),
            plugins=[AtomicCheckpointIO()],
            max_epochs=max_epochs,
            max_steps=max_steps,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=_strategy(zero3, accelerator, accumulate_grad_batches, gradient_clip_val),
            use_distributed_sampler=False,  # the data module deals out each batch itself
            precision=precision,
            accumulate_grad_batches=accumulate_grad_batches,
            gradient_clip_val=gradient_clip_val,
            enable_progress_bar=progress and Console().is_terminal,
            val_check_interval=1.0 if val_every_n_batches is None else val_every_n_batches,
            check_val_every_n_epoch=1 if val_every_n_batches is None else None,
            limit_val_batches=1.0 if has_val else 0,
            num_sanity_val_steps=0,
            enable_model_summary=False,
        )
    except MisconfigurationException as error:
        raise bad_value(
            "trainer.accelerator",
            accelerator,
            "a device this machine has, or auto",
            f"Set trainer=cpu ({' '.join(str(error).split())})",
        ) from error


def check_devices(*, devices: int, num_nodes: int, zero3: dict[str, Any] | None) -> None:
    """Raise where there are several processes and nothing that lets them work together."""
    if zero3 is None and devices * num_nodes > 1:
        raise bad_value(
            "trainer.devices", devices, "1 without ZeRO", "Choose trainer=zero3 for more processes"
        )


def shards(zero3: dict[str, Any] | None) -> Zero3 | None:
    """How weights, gradients and optimiser are shared out by settings ``trainer.zero3``; None: not."""
    target = f"{Zero3.__module__}.{Zero3.__qualname__}"
    return None if zero3 is None else build({"_target_": target, **zero3}, "trainer.zero3")


def _strategy(
    zero3: dict[str, Any] | None,
    accelerator: str,
    accumulate_grad_batches: int,
    gradient_clip_val: float | None,
) -> Strategy | str:
    found = shards(zero3)
    if found is None:
        return "auto"
    return stage3(
        found,
        on_cpu=accelerator == "cpu",
        accumulate_grad_batches=accumulate_grad_batches,
        gradient_clip_val=gradient_clip_val,
    )


def _callbacks(
    folder: Path,
    *,
    monitor: Monitor | None,
    patience: int | None,
    every_n_steps: int | None,
    log_every_n_steps: int,
) -> list[Callback]:
    callbacks: list[Callback] = [ResumeState(), StepMetrics(log_every_n_steps)]
    if monitor is not None:
        mode = "max" if "accuracy" in monitor else "min"
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
    # After the other two, whose state it holds.
    return [*callbacks, LastCheckpoint(folder / "last.ckpt", every_n_steps=every_n_steps)]


def _check_ranges(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise bad_value(
                f"trainer.{name}", value, "a whole number from 1", f"Set trainer.{name}=1"
            )
    if counts["max_epochs"] is None and counts["max_steps"] is None:
        raise bad_value(
            "trainer.max_steps",
            -1,
            "a number of steps, or trainer.max_epochs",
            "Set trainer.max_steps=1000",
        )


def _check_accumulation(data: PreferenceData, trainer: Trainer) -> None:
    """Raise where an epoch ends between summed batches: Lightning steps there, DeepSpeed does not."""
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


def fit(
    model: LightningModule, data: PreferenceData, trainer: Trainer, *, resume_from: Path | None
) -> None:
    """Train from the start or from a checkpoint; the model then has its best weights.

    Of the data only train and val are handed on: what trains and selects cannot reach test.
    """
    _check_accumulation(data, trainer)
    model.train()  # from_pretrained leaves models in eval mode
    open_data = data.restrict_to("train", "val")
    trainer.fit(model, datamodule=open_data, ckpt_path=resume_from, weights_only=True)
    load_best(trainer)
