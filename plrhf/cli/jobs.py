"""Jobs of a sweep: each in a folder that says what differs; one that fails stops no other."""

from __future__ import annotations

import contextlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from plrhf.core.components import WITHOUT_EFFECT, first_difference
from plrhf.core.errors import BadValue, bad_value
from plrhf.core.files import open_to_append, whole_file
from plrhf.core.monitor import higher_is_better
from plrhf.data.digests import content_hash
from plrhf.evaluation.records import Record, read_record, read_settings

FAILED, LOG = "error.txt", "log.txt"
SOME_FAILED = 1
LONGEST_FOLDER = 150  # characters


def job_folder(overrides: str, number: int) -> str:
    """Return the name of a job's folder: its overrides, such as ``encoder=lookup,seed=1``.

    Where they are long or have characters that a file name should not have, a hash keeps it unique.

    Args:
        number: of the job, its name where a sweep has no overrides that differ.
    """
    name = re.sub(r"[^\w.=,+-]+", "_", overrides)
    if name != overrides or len(name) > LONGEST_FOLDER:
        name = f"{name[: LONGEST_FOLDER - 9].strip('_')}-{content_hash(overrides)[:8]}"
    return name if name.strip(".") else str(number)


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)  # of hydra.sweep.subdir


class NameJobs(Callback):
    """Leaves out of the names of a sweep's folders what all its jobs have in common."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        given = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        common = ",".join(f"'{one.key_or_group}'" for one in given if not one.is_sweep_override())
        with read_write(config.hydra):
            config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{common}]"
            )


class FinishedRun(Record):
    """What is read of results.json to tell whether a job is done."""

    config: dict[str, Any]


@contextlib.contextmanager
def sweep_job(
    folder: Path, overrides: list[str], entry: str, one_line: Callable[[Exception], str]
) -> Iterator[None]:
    """Run the block as a job of a sweep: its output goes to log.txt, its error to error.txt.

    An exception other than Ctrl-C ends only this job. Within the block, `sys.argv` is the job's own
    command, as its results record it.

    Args:
        folder: of the job; it exists. overrides: of the job. entry: train.py or eval.py.
        one_line: formats an exception as one line.
    """
    name = " ".join(overrides)
    (folder / FAILED).unlink(missing_ok=True)
    started, argv = time.monotonic(), sys.argv
    try:
        log = open_to_append(folder / LOG, mode="a", buffering=1, encoding="utf-8")
        with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            sys.argv = [entry, *overrides]
            yield
    except (Exception, SystemExit) as error:
        line = one_line(error) if isinstance(error, Exception) else f"exit status {error.code}"
        trace = "" if isinstance(error, BadValue) else traceback.format_exc()
        with whole_file(folder / FAILED) as part:
            part.write_text(f"{line}\n{trace}", encoding="utf-8")
        print(f"failed: {folder}: {name}: {line}", file=sys.stderr, flush=True)
    else:
        print(f"done in {time.monotonic() - started:.0f} s: {folder}: {name}", flush=True)
    finally:
        sys.argv = argv


def refuse_processes(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError if a sweep job would start processes, which would all repeat the sweep."""
    trainer = settings.get("trainer", {})
    for name, alone in (("devices", 1), ("num_nodes", 1), ("zero3", None)):
        if trainer.get(name, alone) != alone:
            allowed = f"{'null' if alone is None else alone} in a sweep"
            raise bad_value(f"trainer.{name}", trainer[name], allowed, "Start each run by itself")


def is_finished(settings: Mapping[str, Any]) -> bool:
    """Return whether ``run_dir`` has all files of a run with the same settings.

    Raises:
        ValueError: it has the results of a run with other settings.
    """
    run_dir = Path(settings["run_dir"])
    before = _config_of_evaluated(run_dir)
    if before is None:
        return False
    ours, theirs = (
        {name: value for name, value in one.items() if name not in WITHOUT_EFFECT}
        for one in (settings, before)
    )
    difference = first_difference(ours, theirs)
    if difference is not None:
        field, _, there = difference
        raise bad_value(
            "run_dir",
            settings["run_dir"],
            f"a directory of its own, as it holds a run of {field}={there!r}",
            "Set run_dir to another, or overwrite=true",
        )
    # The report is written last: a run that was killed before it is run again. model=sft has none.
    return (run_dir / "report.html").is_file() or not (run_dir / "results.json").is_file()


def _config_of_evaluated(run_dir: Path) -> dict[str, Any] | None:
    """Return the settings of the evaluated run in a directory; None if there is none."""
    if (run_dir / "results.json").is_file():
        return read_record(run_dir / "results.json", FinishedRun).config
    if (run_dir / "config.yaml").is_file() and (run_dir / "export/config.json").is_file():
        return read_settings(run_dir / "config.yaml")  # model=sft
    return None


def best_value(run_dir: Path, monitor: str) -> float | None:
    """Return the best value of a metric in metrics.csv; None without any value."""
    values = _monitored(run_dir, monitor)
    return None if len(values) == 0 else _best(values, monitor)


def still_improving(run_dir: Path, monitor: str) -> str | None:
    """Return a line if the last of several validations was the best one; else None."""
    values = _monitored(run_dir, monitor)
    if len(values) < 2 or values[-1] != _best(values, monitor) or values[-1] == values[-2]:
        return None
    return (
        f"{monitor} was best at the last of {len(values)} validations ({values[-2]:.4f}, then "
        f"{values[-1]:.4f}): a longer training may do better (trainer.max_epochs, trainer.max_steps)"
    )


def _monitored(run_dir: Path, monitor: str) -> list[float]:
    """Return the values of a metric in metrics.csv, by step."""
    from plrhf.evaluation.results import read_metrics  # it loads torch and transformers

    metrics = read_metrics(run_dir)
    if metrics is None or monitor not in metrics:
        return []
    return [float(one) for one in metrics[monitor].dropna()]


def _best(values: list[float], monitor: str) -> float:
    return max(values) if higher_is_better(monitor) else min(values)


def failure_line(folder: Path) -> str:
    """Return ``: `` and the error of a failed job in one line; empty for a job that did not fail."""
    path = folder / FAILED
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    return f": {lines[0]}" if len(lines) > 0 else ""


class NameFailedJobs(Callback):
    """Lists the failed jobs at the end of a sweep, and ends the process with status 1 if there are any.

    A job deletes its old error.txt when it starts, so those that are not as they were before the sweep
    are of this sweep.
    """

    def __init__(self) -> None:
        self.before: dict[Path, int] = {}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.before = self._written(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        now = self._written(Path(config.hydra.sweep.dir))
        failures = [path for path, when in now.items() if self.before.get(path) != when]
        if len(failures) == 0:
            return
        head = f"{len(failures)} of the jobs failed; {FAILED} in its folder says more:"
        print(head, file=sys.stderr)
        for path in failures:
            print(f"  {path.parent}{failure_line(path.parent)}", file=sys.stderr)
        sys.exit(SOME_FAILED)

    def _written(self, folder: Path) -> dict[Path, int]:
        """Return when each error.txt was written, in nanoseconds."""
        return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob(FAILED))}
