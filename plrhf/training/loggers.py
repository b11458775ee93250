"""The loggers of a run: metrics.csv, and optionally TensorBoard, Weights & Biases and MLflow."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from plrhf.core.errors import bad_value
from plrhf.core.files import open_to_append, whole_file
from plrhf.training.steps import is_accumulating

BOUNDS = ("/low", "/high")
"""Ends of the names of an interval's bounds."""


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
            with open_to_append(self.path, mode="a", newline="") as file:
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
        with whole_file(self.path) as part, part.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(self.rows)

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
    *,
    run_dir: Path,
    name: str | None = None,
    tensorboard: bool = False,
    wandb: Mapping[str, Any] | None = None,
    mlflow: Mapping[str, Any] | None = None,
) -> list[Logger]:
    """Build the loggers of a run.

    Args:
        run_dir: where metrics.csv, and local files of the others, go.
        name: of the run in Weights & Biases and MLflow, unless their arguments have another; None: they
            choose one.
        tensorboard: also log to TensorBoard.
        wandb: arguments of Lightning's WandbLogger; None: do not log to Weights & Biases.
        mlflow: arguments of Lightning's MLFlowLogger; None: do not log to MLflow.

    Raises:
        ValueError: a library is not installed.
    """
    loggers: list[Logger] = [MetricsFile(run_dir / "metrics.csv")]
    if tensorboard:
        loggers.append(
            TensorBoardLogger(run_dir, name="", version="tensorboard", default_hp_metric=False)
        )
    if wandb is not None:
        _check_installed("wandb")
        loggers.append(WandbLogger(save_dir=run_dir, **{"name": name, **wandb}))
    if mlflow is not None:
        _check_installed("mlflow")
        loggers.append(MLFlowLogger(**{"run_name": name, **mlflow}))
    return loggers


def _check_installed(name: str) -> None:
    """Raise a ValueError if the library of a logger is not installed."""
    if find_spec(name) is None:
        cure = f"Install it: pip install -c constraints.txt '.[{name}]'"
        raise bad_value("logger", name, f"csv or tensorboard, as {name} is not installed", cure)


def log_settings(loggers: Sequence[Logger], settings: Mapping[str, Any]) -> None:
    """Log all settings of a run as its hyperparameters."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.hparams.update(settings)  # to hparams.yaml; its columns come with the results
        else:
            logger.log_hyperparams(dict(settings))


def log_results(
    loggers: Sequence[Logger],
    settings: Mapping[str, Any],
    results: Mapping[str, float],
    step: int,
) -> None:
    """Log test results beside metrics.csv; results.json holds them anyway.

    TensorBoard gets the settings with them, since it shows settings beside those metrics alone that are
    known when they are logged. Ends of intervals are curves there, not columns beside the settings.
    """
    for logger in loggers:
        if isinstance(logger, MetricsFile):
            continue
        others = dict(results)
        if isinstance(logger, TensorBoardLogger):
            columns = {name: others.pop(name) for name in results if not name.endswith(BOUNDS)}
            logger.log_hyperparams(dict(settings), columns, step)
        logger.log_metrics(others, step)
        logger.save()


def log_files(loggers: Sequence[Logger], paths: Sequence[Path]) -> None:
    """Keep files of a finished run as artifacts of Weights & Biases and MLflow, and end its run there.

    TensorBoard has no artifacts. It shows tables in Markdown as texts.
    """
    found = [path for path in paths if path.is_file()]
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for path in found:
                if path.suffix == ".md":
                    logger.experiment.add_text(path.stem, path.read_text(encoding="utf-8"))
            logger.save()
        if isinstance(logger, WandbLogger):
            from wandb import Artifact

            artifact = Artifact(f"results-{logger.version}", type="results")
            for path in found:
                artifact.add_file(str(path))
            logger.experiment.log_artifact(artifact)
            logger.experiment.finish()  # else the next job of a sweep would go on with this run
        if isinstance(logger, MLFlowLogger):
            for path in found:
                logger.experiment.log_artifact(logger.run_id, str(path))
            logger.finalize("success")  # no trainer has ended the run of a comparison
