"""Writers that are killed, have no room left, or are two at a time: the old file, or the new one.

FAULTS=full python -m pytest tests/faults/test_kills.py -s
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sizes import size

from plrhf.core import files
from plrhf.core.errors import BadValue
from plrhf.core.files import is_disk_full
from plrhf.data.cache_files import CachedArrays, cache_file, cached
from plrhf.evaluation.records import read_settings, write_settings
from plrhf.evaluation.results import read_predictions, read_results, write_evaluation
from plrhf.models.card import read_card
from plrhf.models.enrolment import forget
from plrhf.models.export import check_files, remove_leftovers, restore
from plrhf.reporting.comparison_page import compare
from plrhf.reporting.report import write_report
from plrhf.reporting.runs import read_run
from plrhf.training.checkpoints import AtomicCheckpointIO, read_checkpoint
from plrhf.training.loggers import MetricsFile

KILLS = size(1, 7)
"""Kills of each writer."""


@dataclass(frozen=True)
class Writer:
    """What writes files, and what reads them.

    Attributes:
        write: writes version 1 or 2 into a folder. read: returns the version that a reader finds; an
            error in one line stands for none.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], int | None]


def write_checkpoint(folder: Path, version: int) -> None:
    needed = ("state_dict", "optimizer_states", "loops", "random_states", "train_loader")
    weights = {"weight": torch.full((20_000,), float(version))}
    content = {**dict.fromkeys(needed, {}), "state_dict": weights}
    AtomicCheckpointIO().save_checkpoint(content, folder / "last.ckpt")


def checkpoint_in(folder: Path) -> int:
    weights = read_checkpoint(folder / "last.ckpt")["state_dict"]["weight"]
    assert len(weights.unique()) == 1
    return int(weights[0])


def write_cache(folder: Path, version: int) -> None:
    with cache_file(folder / "cache", f"tokens-{version}") as file:
        file.add("ids", np.full(50_000, version, np.uint8))


def cached_in(folder: Path) -> int:
    found = [one for n in (2, 1) for one in cached(folder / "cache", f"tokens-{n}", ids_in)]
    assert all(len(np.unique(ids)) == 1 for ids in found)
    return int(found[0][0])


def ids_in(file: CachedArrays) -> Any:
    return file["ids"][:]


def write_predictions(folder: Path, version: int) -> None:
    results = read_results(folder / "run")
    table = pd.read_parquet(folder / "run/predictions.parquet").assign(margin=float(version))
    changed = results.model_copy(update={"data": {"version": version}})
    write_evaluation(folder / "run", changed, table)


def predicted_in(folder: Path) -> int:
    results = read_results(folder / "run")
    table = read_predictions(folder / "run", results)
    assert set(table["margin"]) == {results.data["version"]}
    return int(results.data["version"])


def write_metrics(folder: Path, version: int) -> None:
    MetricsFile(folder / "metrics.csv").log_metrics(
        {f"metric {n}": 1.0 for n in range(1_000 * version)}, step=0
    )


def metrics_in(folder: Path) -> int:
    table = pd.read_csv(folder / "metrics.csv")
    assert (table.drop(columns="step") == 1).all(axis=None)
    return (len(table.columns) - 1) // 1_000


def write_page(folder: Path, version: int) -> None:
    """The run's report, which names its encoder."""
    results = read_results(folder / "run")
    encoder = {**results.config["encoder"], "name": f"version-{version}"}
    config = {**results.config, "encoder": encoder}
    table = pd.read_parquet(folder / "run/predictions.parquet")
    write_evaluation(folder / "run", results.model_copy(update={"config": config}), table)
    write_report(folder / "run")


def page_in(folder: Path) -> int:
    text = (folder / "run/report.html").read_text()
    assert text.rstrip().endswith("</html>")
    return 2 if "version-2" in text else 1


def write_comparison(folder: Path, version: int) -> None:
    shutil.copytree(folder / "run", folder / f"version-{version}", dirs_exist_ok=True)
    compare([folder / f"version-{version}"], folder / "out")


def compared_in(folder: Path) -> int:
    """The version on the page; each of the tables is whole and of one version."""
    for name in ("csv", "md", "tex", "html"):
        path = folder / f"out/{'report' if name == 'html' else 'comparison'}.{name}"
        text = path.read_text()
        assert ("version-1" in text) != ("version-2" in text), path
        assert {"html": "</html>", "tex": "\\end"}.get(name, "\n") in text[-400:], path
    return 1 if "version-1" in text else 2


def exported_in(folder: Path) -> int:
    """2 once a person was forgotten."""
    restore(folder / "run/export")
    card = read_card(folder / "run/export")
    check_files(folder / "run/export", card)
    return 2 if len(card.users) == 4 else 1


def write_export(folder: Path, version: int) -> None:
    remove_leftovers(folder / "run/export")
    users = read_card(folder / "run/export").users
    if version == 2 and len(users) == 5:
        forget(folder / "run/export", users[1])


WRITERS = {
    "checkpoint": Writer(write_checkpoint, checkpoint_in),
    "cache": Writer(write_cache, cached_in),
    "predictions": Writer(write_predictions, predicted_in),
    "settings": Writer(
        lambda folder, version: write_settings(folder / "config.yaml", {"a": [version] * 3_000}),
        lambda folder: read_settings(folder / "config.yaml")["a"][-1],
    ),
    "metrics": Writer(write_metrics, metrics_in),
    "report": Writer(write_page, page_in),
    "comparison": Writer(write_comparison, compared_in),
    "export": Writer(write_export, exported_in),
}


@pytest.fixture
def folder(reward_run: Path, tmp_path: Path) -> Path:
    """A folder with a copy of a run, without its checkpoints."""
    shutil.copytree(reward_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path


def child_of(work: Callable[..., object], *arguments: Any) -> int:
    """Begin a process that does something and ends with status 0, or 1 after an error; return its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(*arguments)
            status = 0
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    """Wait for a process; return its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def calls_of(writer: Writer, home: Path, killed_at: int | None = None) -> int:
    """Write version 2 and count the function calls; at that one of them the process kills itself."""
    calls = count(1)

    def notice(*_: Any) -> None:
        if next(calls) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(notice)
    try:
        writer.write(home, 2)
    finally:
        sys.setprofile(None)
    return next(calls) - 1


@pytest.mark.slow
def test_a_kill_leaves_the_old_or_the_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ABANDONED_AFTER", 0.0)  # what the dead leave is removed at once
    draw, found = random.Random(1), []
    for name, writer in WRITERS.items():
        home = folder / name
        shutil.copytree(folder / "run", home / "run")
        writer.write(home, 1)
        backup = shutil.copytree(home, folder / "backup")
        n_calls = calls_of(writer, home)
        for _ in range(KILLS):
            shutil.rmtree(home)
            shutil.copytree(backup, home)
            # Most calls compute; the last tenth writes.
            place = draw.randint(1 if draw.random() < 0.3 else int(0.9 * n_calls), n_calls)
            status = ended(child_of(calls_of, writer, home, place))
            assert status in (-signal.SIGKILL, 0), name
            found.append(f"{name} {version_in(writer, home)}")
            writer.write(home, 2)  # it goes on
            assert writer.read(home) == 2, name
            assert not [*home.rglob("*.part"), *home.rglob("*.old")], name
        shutil.rmtree(folder / "backup")
    print(
        f"\n{len(found)} kills: "
        + ", ".join(f"{found.count(one)} {one}" for one in sorted(set(found)))
    )


def version_in(writer: Writer, home: Path) -> str:
    """What a reader finds: the old version, the new one, or that two files do not fit, in one line."""
    try:
        return {1: "old", 2: "new"}[writer.read(home)]  # type: ignore[index]
    except BadValue as error:
        assert "\n" not in str(error)
        return "refused"


def test_predictions_of_other_results_are_refused(folder: Path) -> None:
    """A process that is killed between the renames of the two files leaves the new one of one of them."""

    def killed_between() -> None:
        def replace(old: Path, new: Path) -> None:
            old.rename(new)
            os.kill(os.getpid(), signal.SIGKILL)

        files.os.replace = replace  # type: ignore[assignment]  # of this process alone
        write_predictions(folder, 2)

    write_predictions(folder, 1)
    assert ended(child_of(killed_between)) == -signal.SIGKILL
    assert read_results(folder / "run").data == {"version": 1}
    assert set(pd.read_parquet(folder / "run/predictions.parquet")["margin"]) == {2.0}
    said = r"run/predictions.parquet=.altered or damaged. is not allowed: .*Evaluate the run anew.$"
    with pytest.raises(BadValue, match=said):
        read_run(folder / "run")
    write_predictions(folder, 2)
    assert set(read_run(folder / "run").predictions["margin"]) == {2.0}


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_and_is_known(folder: Path) -> None:
    """No file may grow beyond a limit, at which writing fails as on a full disk."""
    faults, n_full = [], 0

    def limited(writer: Writer, home: Path, limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            writer.write(home, 2)
        except Exception as error:
            os._exit(2 if isinstance(error, BadValue) or is_disk_full(error) else 3)

    for name, writer in WRITERS.items():
        home = folder / name
        shutil.copytree(folder / "run", home / "run")
        writer.write(home, 1)
        for limit in (100, 1_500, 20_000)[: size(2, 3)]:
            status = ended(child_of(limited, writer, home, limit))
            n_full += status == 2
            if status not in (0, 2) or status == 2 and list(home.rglob("*.part")):
                faults.append(
                    f"{name} at {limit} bytes: status {status}, {list(home.rglob('*.part'))}"
                )
            if status == 2 and (there := version_in(writer, home)) != "old":
                faults.append(f"{name} at {limit} bytes: {there}, though it failed")
    print(f"\n{n_full} full disks; faults: {len(faults)}")
    assert faults == [] and n_full >= len(WRITERS)


@pytest.mark.slow
def test_processes_share_a_cache(tmp_path: Path) -> None:
    """Four write and read the same entries; none sees half of one."""

    def work() -> None:
        draw = random.Random(os.getpid())
        for _ in range(size(100, 2_000)):
            stem, content = (
                f"tokens-{draw.randrange(3)}",
                np.full(50_000, draw.randrange(2), np.uint8),
            )
            with cache_file(tmp_path, stem) as file:
                file.add("ids", content)
            for ids in cached(tmp_path, stem, ids_in):
                assert len(np.unique(ids)) == 1

    assert [ended(one) for one in [child_of(work) for _ in range(4)]] == [0] * 4
    assert not list(tmp_path.glob("*.part"))
    print(f"\n4 processes, {4 * size(100, 2_000):,} entries written to one cache")
