"""The loggers of a run: metrics.csv, and optionally TensorBoard and Weights & Biases."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from plrhf.core.errors import bad_value
from plrhf.training.steps import is_accumulating


class MetricsFile(Logger):
    """Writes metrics to metrics.csv immediately, with a new column for each new metric.

    Lightning's CSVLogger starts a new version when a run is resumed, and delays writing.

    Args:
        path: the file; an existing one is overwritten unless `keep_steps` is called first.
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
        """Do nothing: config.yaml holds the settings."""

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
    def keep_steps(self, n_steps: int) -> None:
        """Keep the rows of the first `n_steps` steps from the existing file, and drop the others."""
        if not self.path.is_file():
            return
        lines = self.path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one short
        rows = list(csv.DictReader(whole))
        self.rows = [row for row in rows if int(row["step"]) < n_steps]
        self.columns = sorted({name for row in self.rows for name in row})
        self._write_all()

    def _write_all(self) -> None:
        """Write all rows to a temporary file and rename it."""
        part = self.path.with_name(f"{self.path.name}.part")
        with part.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(part, self.path)

    def _writer(self, file: IO[str]) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self.columns, lineterminator="\n")


class StepMetrics(Callback):
    """Logs the train metrics of a step before a checkpoint of that step is written.

    Lightning logs after all callbacks. A kill between the checkpoint and the log would lose the row,
    since resuming starts with the next step. A row without its checkpoint does no harm:
    `MetricsFile.keep_steps` drops it.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if is_accumulating(trainer) or trainer.global_step % self.every_n_steps != 0:
            return
        found = trainer.callback_metrics.items()
        row = {name: value.item() for name, value in found if name.startswith("train/")}
        for logger in trainer.loggers:
            logger.log_metrics({**row, "epoch": trainer.current_epoch}, trainer.global_step - 1)


def build_loggers(
    *, run_dir: Path, tensorboard: bool = False, wandb: dict[str, Any] | None = None
) -> list[Logger]:
    """Build the loggers of a run.

    Args:
        run_dir: where metrics.csv and TensorBoard's files go.
        tensorboard: also log to TensorBoard.
        wandb: arguments of Lightning's WandbLogger; None: do not log to Weights & Biases.

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


def log_settings(loggers: Sequence[Logger], settings: Mapping[str, Any]) -> None:
    """Log all settings of a run as hyperparameters to TensorBoard and Weights & Biases."""
    for logger in loggers:
        logger.log_hyperparams(dict(settings))


def log_test_results(loggers: Sequence[Logger], results: Mapping[str, float], step: int) -> None:
    """Log test results to TensorBoard and Weights & Biases; results.json holds them anyway."""
    for logger in loggers:
        if not isinstance(logger, MetricsFile):
            logger.log_metrics(dict(results), step)
            logger.save()
