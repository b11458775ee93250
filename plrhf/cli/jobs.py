"""Jobs of a sweep: one that fails costs no other, none is done twice, and the end says how all went."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from plrhf.core.components import ASIDE, first_difference
from plrhf.core.errors import BadValue, bad_value

FAILED, LOG = "error.txt", "log.txt"
SOME_FAILED = 1


@contextlib.contextmanager
def job(
    folder: Path, overrides: list[str], entry: str, word: Callable[[Exception], str]
) -> Iterator[None]:
    """Within it a job of a sweep says what it says in its folder, and keeps there why it failed.

    Only Ctrl-C gets out of it, so that the other jobs are done. What a run notes as its command is
    the job's own, and not the sweep's.

    Args:
        folder: the job's, which is there. overrides: of the job. entry: train.py or eval.py.
        word: an exception in one line.
    """
    name = " ".join(overrides)
    (folder / FAILED).unlink(missing_ok=True)
    started, argv = time.monotonic(), sys.argv
    try:
        log = (folder / LOG).open("a", buffering=1, encoding="utf-8")
        with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            sys.argv = [entry, *overrides]
            yield
    except (Exception, SystemExit) as error:
        line = word(error) if isinstance(error, Exception) else f"exit status {error.code}"
        trace = "" if isinstance(error, BadValue) else traceback.format_exc()
        (folder / FAILED).write_text(f"{line}\n{trace}", encoding="utf-8")
        print(f"failed: {folder}: {name}: {line}", file=sys.stderr, flush=True)
    else:
        print(f"done in {time.monotonic() - started:.0f} s: {folder}: {name}", flush=True)
    finally:
        sys.argv = argv


def refuse_processes(settings: Mapping[str, Any]) -> None:
    """Raise where a job of a sweep would start processes: each would start the whole sweep again."""
    trainer = settings.get("trainer", {})
    for name, alone in (("devices", 1), ("num_nodes", 1), ("zero3", None)):
        if trainer.get(name, alone) != alone:
            allowed = f"{'null' if alone is None else alone} in a sweep"
            raise bad_value(f"trainer.{name}", trainer[name], allowed, "Start each run by itself")


def is_finished(settings: Mapping[str, Any]) -> bool:
    """Whether ``run_dir`` holds this very run with its results, which then need no second time.

    Raises:
        ValueError: it holds the results of another run, which would be lost.
    """
    path = Path(settings["run_dir"]) / "results.json"
    if not path.is_file():
        return False
    before = json.loads(path.read_text(encoding="utf-8"))["config"]
    now, before = (
        {name: value for name, value in one.items() if name not in ASIDE}
        for one in (settings, before)
    )
    difference = first_difference(now, before)
    if difference is not None:
        field, _, theirs = difference
        raise bad_value(
            "run_dir",
            settings["run_dir"],
            f"a directory of its own, as it holds a run of {field}={theirs!r}",
            "Set run_dir to another",
        )
    return True


def why_failed(folder: Path) -> str:
    """What a job of a sweep failed by, in one line behind a colon; empty where none failed here."""
    path = folder / FAILED
    return f": {path.read_text(encoding='utf-8').splitlines()[0]}" if path.is_file() else ""


class Ending(Callback):
    """Names at a sweep's end the jobs that failed, and ends with status 1 if there are any."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        for path in _failures(config):
            path.unlink()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        failures = _failures(config)
        if len(failures) == 0:
            return
        head = f"{len(failures)} of the jobs failed; {FAILED} in its folder says more:"
        print(head, file=sys.stderr)
        for path in failures:
            print(f"  {path.parent}{why_failed(path.parent)}", file=sys.stderr)
        sys.exit(SOME_FAILED)


def _failures(config: DictConfig) -> list[Path]:
    """What failed jobs left in the directory of the sweep."""
    return sorted(Path(config.hydra.sweep.dir).rglob(FAILED))
