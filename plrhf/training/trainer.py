"""The Lightning trainer of a run: what it watches, when it stops, and how it goes on after a kill."""

from __future__ import annotations

import contextlib
import csv
import os
import random
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, Literal
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import Tensor

from plrhf.core.components import build
from plrhf.core.errors import bad_value
from plrhf.data.dataset import RankShard
from plrhf.data.module import PreferenceData
from plrhf.training.zero import Stage3, Zero3, stage3

STARTED_BY = "PLRHF_STARTED_BY"  # environment variable: the process that started this one
Monitor = Literal["val/loss", "val/accuracy_micro", "val/accuracy_macro", "val/nll"]


class MetricsFile(Logger):
    """metrics.csv: every row on disk at once; columns grow as metrics come.

    Args:
        path: the file; one that is there is begun anew unless `go_on` is called.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.columns: list[str] = []

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Settings stand in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {**metrics, "step": step}
        self.rows.append(row)
        if set(row) <= set(self.columns):
            with self.path.open("a", newline="") as file:
                self._writer(file).writerow(row)
        else:
            self.columns = sorted({*self.columns, *row})
            self._write_all()

    @rank_zero_only
    def go_on(self, n_steps: int) -> None:
        """Keep what an earlier process wrote about its first `n_steps` steps."""
        if not self.path.is_file():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one short
        rows = list(csv.DictReader(whole))
        self.rows = [row for row in rows if int(row["step"]) < n_steps]
        self.columns = sorted({name for row in self.rows for name in row})
        self._write_all()

    def _write_all(self) -> None:
        part = self.path.with_name(f"{self.path.name}.part")
        with part.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(part, self.path)

    def _writer(self, file: IO[str]) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self.columns, lineterminator="\n")


class Resume(Callback):
    """Restores what Lightning does not: random state, place in the data, metrics.csv, a stop.

    The place in the data it does store, but forgets where a schedule's length is asked for.
    """

    def __init__(self) -> None:
        self.restored: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        checkpoint["train_loader"] = trainer.train_dataloader.state_dict()  # type: ignore[union-attr]
        own = {
            "python": random.getstate(),
            "numpy": (kind, np.asarray(keys).tolist(), position, has_gauss, cached),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        checkpoint["random_states"] = of_all_processes(own)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.restored = {"loader": checkpoint["train_loader"]}
        states = checkpoint["random_states"]
        if trainer.global_rank < len(states):
            self.restored |= states[trainer.global_rank]
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.go_on(checkpoint["global_step"])
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                _found_again(checkpoint["callbacks"][callback.state_key], callback.dirpath)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank > 0:  # each process draws dropout of its own
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        if self.restored is None:
            return
        trainer.train_dataloader.load_state_dict(self.restored["loader"])  # type: ignore[union-attr]
        self._restore_random_state(self.restored)
        for stopping in trainer.early_stopping_callbacks:  # of an earlier process
            if stopping.stopping_reason != EarlyStoppingReason.NOT_STOPPED:
                trainer.should_stop = True

    def _restore_random_state(self, state: dict[str, Any]) -> None:
        if "torch" not in state:  # a process that the earlier run did not have
            return
        random.setstate(state["python"])
        kind, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) > 0 and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])


def of_all_processes(own: Any) -> list[Any]:
    """What each process of the run has, by rank."""
    if not torch.distributed.is_initialized():
        return [own]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found


def _found_again(state: dict[str, Any], folder: Any) -> None:
    """Point the state of "best" to where the run lies now, which may have been moved."""
    if state["best_model_path"] != "":
        best = str(Path(folder, Path(state["best_model_path"]).name))
        scores = dict.fromkeys([best], state["best_model_score"])
        state.update(best_model_path=best, kth_best_model_path=best, best_k_models=scores)
    state["dirpath"] = folder


class StepMetrics(Callback):
    """Hands loggers a step's train metrics while no checkpoint holds the step yet.

    Lightning would after all callbacks: a kill after the checkpoint would lose the line for good,
    as going on begins with the next step. One before it leaves a line that `go_on` drops.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if summing_gradients(trainer) or trainer.global_step % self.every_n_steps != 0:
            return
        found = trainer.callback_metrics.items()
        row = {name: value.item() for name, value in found if name.startswith("train/")}
        for logger in trainer.loggers:
            logger.log_metrics({**row, "epoch": trainer.current_epoch}, trainer.global_step - 1)


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, written only where training can go on from exactly.

    That is where a step is over with all that belongs to it: not before a validation that is due,
    which Lightning would leave out on resuming, nor between batches whose gradients are summed,
    which no checkpoint holds.

    Args:
        path: the file. every_n_steps: save also between validations, None: only after them (without
            val pairs: after each epoch).
    """

    def __init__(self, path: Path, *, every_n_steps: int | None) -> None:
        self.path, self.every_n_steps = path, every_n_steps
        self.saved_at = 0

    def _save(self, trainer: Trainer) -> None:
        self.saved_at = trainer.global_step
        trainer.save_checkpoint(self.path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        steps = trainer.global_step - self.saved_at
        if self.every_n_steps is None or steps < self.every_n_steps or trainer.is_last_batch:
            return
        if not summing_gradients(trainer) and not validation_is_due(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not summing_gradients(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)


def summing_gradients(trainer: Trainer) -> bool:
    """Whether the batch just taken left its gradient for a later one to step with."""
    accumulated_batches = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches
    return accumulated_batches != 0 and not trainer.is_last_batch


def validation_is_due(trainer: Trainer) -> bool:
    """Whether validation follows the batch just taken, which is not an epoch's last."""
    every = trainer.val_check_batch
    counts_batches = trainer.enable_validation and trainer.check_val_every_n_epoch is None
    return counts_batches and (trainer.fit_loop.total_batch_idx + 1) % int(every or 1) == 0


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints aside and renames them: a kill at any moment leaves the old or the new."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        torch.save(checkpoint, part)
        _on_disk(part)  # else a power cut could leave the new name with old content
        os.replace(part, path)
        _on_disk(path.parent)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def _on_disk(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU, its checksums compared; nothing of it is unpickled.

    Raises:
        ValueError: it is cut short or altered, or not a checkpoint of a run.
    """
    try:
        with ZipFile(path) as archive:  # as torch.save writes, a CRC-32 with each record
            damaged = archive.testzip()
        if damaged is not None:
            raise BadZipFile(f"checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (BadZipFile, OSError, RuntimeError, UnpicklingError, zlib.error, EOFError) as error:
        raise bad_value(
            "ckpt",
            str(path),
            "a whole checkpoint, as train.py wrote it",
            f"Begin anew without ckpt=last ({' '.join(str(error).split())[:120]})",
        ) from error
    needed = {"state_dict", "optimizer_states", "loops", "random_states", "train_loader"}
    if not (isinstance(content, dict) and needed <= content.keys()):
        found = sorted(content)[:3] if isinstance(content, dict) else type(content).__name__
        raise bad_value(
            "ckpt",
            str(path),
            f"a checkpoint of train.py (it holds {found})",
            "Begin anew without it",
        )
    return content


def build_loggers(
    *, run_dir: Path, tensorboard: bool = False, wandb: dict[str, Any] | None = None
) -> list[Logger]:
    """metrics.csv always, TensorBoard and Weights & Biases (arguments of its logger) if asked.

    Raises:
        ValueError: Weights & Biases is not installed.
    """
    loggers: list[Logger] = [MetricsFile(run_dir / "metrics.csv")]
    if tensorboard:
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    if wandb is not None:
        if find_spec("wandb") is None:
            raise bad_value(
                "logger", "wandb", "csv or tensorboard, as wandb is not installed", "Install wandb"
            )
        loggers.append(WandbLogger(save_dir=run_dir, **wandb))
    return loggers


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
            plugins=[WholeFiles()],
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
    callbacks: list[Callback] = [Resume(), StepMetrics(log_every_n_steps)]
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


def load_best(trainer: Trainer) -> None:
    """Put the weights of the best checkpoint, chosen on val, into the model; none: leave it."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path != "":
            best = read_checkpoint(Path(callback.best_model_path))
            trainer.strategy.load_model_state_dict(best, strict=False)


@contextlib.contextmanager
def processes(trainer: Trainer) -> Iterator[None]:
    """Within it the trainer's other processes run and are connected, if it has any.

    They start before there is a model, so that one can be built in shards; torchrun and SLURM have
    started them already. An error in this process ends those that it started: they would wait for it
    for ever.
    """
    launcher = trainer.strategy.launcher
    if launcher is None:
        yield
        return
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise bad_value(
            "trainer.devices",
            trainer.num_devices,
            "1 in a sweep, whose runs would each start the whole sweep again",
            "Start each run by itself",
        )
    _check_started(trainer)
    if trainer.local_rank == 0:
        os.environ[STARTED_BY] = str(os.getpid())  # of those that are about to be started
    elif STARTED_BY in os.environ:
        starter = int(os.environ[STARTED_BY])
        threading.Thread(target=_end_after, args=(starter,), daemon=True).start()
    try:
        launcher.launch(trainer.strategy.setup_environment)
        yield
    except BaseException:
        launcher.kill(signal.SIGKILL)
        raise


def _end_after(starter: int) -> None:
    """End this process when the one that started it is gone, which if killed cannot see to that."""
    while os.getppid() == starter:
        time.sleep(1)
    os._exit(1)


def _check_started(trainer: Trainer) -> None:
    """Raise where torchrun or SLURM started other processes than the trainer was told of."""
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    try:
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)
    except ValueError as error:
        raise bad_value(
            "trainer.devices",
            trainer.num_devices,
            f"with trainer.num_nodes={trainer.num_nodes} the processes a node that were started",
            f"Set both to what was started ({' '.join(str(error).split())})",
        ) from error


def rank_shard_of(trainer: Trainer) -> RankShard:
    """What the trainer's process takes of every batch, and how batches make up a step."""
    strategy = trainer.strategy

    def total(values: Tensor) -> Tensor:
        summed: Any = strategy.reduce(values.to(strategy.root_device), reduce_op="sum")
        return summed.cpu()

    return RankShard(
        trainer.global_rank,
        trainer.world_size,
        total,
        strategy.broadcast,
        trainer.accumulate_grad_batches,
    )


def shards_of(trainer: Trainer) -> Any:
    """The context in which the trainer's models are sharded as they are made, None if they are not."""
    strategy = trainer.strategy
    return strategy.model_sharded_context if isinstance(strategy, Stage3) else None


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
