"""The run directory: whether it may be used, its files, and from where a run is resumed."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from plrhf.cli.config import RunConfig
from plrhf.cli.jobs import FAILED
from plrhf.core.components import first_difference
from plrhf.core.errors import bad_value
from plrhf.core.files import PART
from plrhf.evaluation.records import read_settings, write_settings
from plrhf.training.checkpoints import read_checkpoint

LEFT_BY_RUNS = (
    *("config.yaml", "metrics.csv", "checkpoints", "predictions.parquet", "results.json"),
    *("users.json", "report.html", "export", "generations.jsonl", "winrate.json", "adapt.json"),
    *("adapt_seen.json", "eval", "tensorboard", "wandb"),
)
"""Everything that train.py and eval.py may leave in a run directory."""

RESUMED_SETTINGS = (
    "seed",
    "data",
    "backbone",
    "encoder",
    "aggregator",
    "model",
    "optim",
    "privacy",
)
"""Settings that must be the same when a run is resumed."""

ROWS = "rows_hash"  # in a checkpoint


@dataclass(frozen=True)
class Resume:
    """A checkpoint to resume from, and the hash of the rows that it was trained on."""

    path: Path
    rows_hash: str | None


class RecordRows(Callback):
    """Adds the hash of the run's rows to every checkpoint."""

    def __init__(self, rows_hash: str) -> None:
        self.rows_hash = rows_hash

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[ROWS] = self.rows_hash


def files_of_run(run_dir: Path) -> list[Path]:
    """Return the files that an earlier run left in a directory, half-written and half-replaced ones too."""
    names = [name for one in LEFT_BY_RUNS for name in (one, f"{one}.part", f"{one}.old")]
    parts = [
        path for path in sorted(run_dir.glob("*.part")) if PART.sub("", path.name) in LEFT_BY_RUNS
    ]
    return [*(run_dir / name for name in names if os.path.lexists(run_dir / name)), *parts]


def check_unused(config: RunConfig) -> None:
    """Raise a ValueError if ``run_dir`` has files of another run and neither ckpt nor overwrite is set."""
    if config.ckpt is not None or config.overwrite:
        return
    found = files_of_run(Path(config.run_dir))
    if len(found) > 0:
        raise bad_value(
            "run_dir",
            config.run_dir,
            f"a directory of its own, as it holds {found[0].name} of another run",
            "Set run_dir to another, overwrite=true to remove that run, or ckpt=last to go on with it",
        )


@rank_zero_only
def begin_run(config: RunConfig, *, resume: Resume | None) -> None:
    """Make the run directory and write config.yaml.

    The files of an earlier run are deleted unless it is resumed. The error of an earlier sweep job is
    deleted in both cases.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / FAILED).unlink(missing_ok=True)
    if resume is None:
        for path in files_of_run(run_dir):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    write_settings(run_dir / "config.yaml", config.resolved)


def find_resume(config: RunConfig) -> Resume | None:
    """Return the checkpoint of ``ckpt=last``; None if the run starts from the beginning.

    Raises:
        ValueError: there is none, or it was written with other settings.
    """
    if config.ckpt is None:
        return None
    run_dir = Path(config.run_dir)
    path = run_dir / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise bad_value("ckpt", "last", f"a run that left {path}", "Set run_dir to that run's")
    before = read_settings(run_dir / "config.yaml")
    now, then = (
        {name: one.get(name) for name in RESUMED_SETTINGS} for one in (config.resolved, before)
    )
    difference = first_difference(now, then)
    if difference is not None:
        field, ours, theirs = difference
        raise bad_value(
            field,
            ours,
            f"{theirs!r}, which the run began with",
            "Repeat its command with ckpt=last",
        )
    return Resume(path, read_checkpoint(path).get(ROWS))


def check_same_rows(resume: Resume | None, rows_hash: str) -> None:
    """Raise a ValueError if a resumed run would train on other rows than before."""
    if resume is not None and resume.rows_hash != rows_hash:
        raise bad_value(
            "data",
            f"rows {rows_hash}",
            f"the rows {resume.rows_hash}, which the run began with",
            "Restore the file that it read, or, if an earlier version wrote the run, begin anew",
        )
