"""eval=referee: compares all methods on the same rows by one protocol, and writes the leaderboard."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from plrhf.cli.assemble import print_lines
from plrhf.cli.config import RunConfig
from plrhf.cli.eval_config import EvalConfig, RefereeTask, overrides_of
from plrhf.cli.main import silence_libraries
from plrhf.cli.methods import Method, method_names, read_method
from plrhf.cli.referee_job import Job, do_job
from plrhf.core.errors import bad_value
from plrhf.data.digests import content_hash
from plrhf.referee.page import WIDE, write_leaderboard
from plrhf.referee.store import Store
from plrhf.reporting import tables
from plrhf.training.processes import exit_with_parent

A_DAY = 86400.0


def referee(config: EvalConfig) -> None:
    """Run the jobs that have no result yet, and write referee.csv, referee.md and report.html."""
    task: RefereeTask = config.task
    overrides = overrides_of("data", "backbone")
    if task.rows is None and config.data is None:
        raise bad_value("data", None, "rows", "Write data=jsonl data.path=FILE, or eval.rows=[...]")
    out = Path(config.out or "runs/referee")
    store = Store(out)
    jobs = list(jobs_of(task, overrides))
    left = [job for job in jobs if not store.has(*job.place, job.fingerprint)]
    with progress_bar() as bar:
        shown = bar.add_task("", total=len(jobs), completed=len(jobs) - len(left))
        started = time.perf_counter()
        for n_done, (job, reason) in enumerate(do_jobs(left, store, task.jobs), start=1):
            bar.update(shown, description=job.words, advance=1)
            if reason is not None:
                print_lines([f"{job.words}: left out ({reason})"])
            if bar.disable:
                minutes = (time.perf_counter() - started) / 60
                left_over = minutes / n_done * (len(left) - n_done)
                print_lines(
                    [f"{n_done}/{len(left)} {job.words}, {minutes:.1f} min, {left_over:.1f} left"]
                )
    made = write_leaderboard(out, store)
    for rows, table in made.tables.items():
        tables.console().print(tables.rich_table(table, title=rows, without=WIDE))
    print(f"report: {made.report}")


def progress_bar() -> Progress:
    """Return a progress bar over jobs with the remaining time; it is disabled without a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = tables.console()
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=A_DAY,  # of all jobs done, as one takes longer than the default
    )


def do_jobs(
    jobs: Sequence[Job], store: Store, n_processes: int
) -> Iterator[tuple[Job, str | None]]:
    """Run jobs in `n_processes` processes; yield each finished job, and why it was left out (or None)."""
    n_processes = min(n_processes, len(jobs))
    if n_processes <= 1:
        for job in jobs:
            yield job, do_job(job, store)
        return
    n_threads = max(1, torch.get_num_threads() // n_processes)
    pool = ProcessPoolExecutor(
        n_processes,
        mp_context=get_context("spawn"),
        initializer=start_process,
        initargs=(os.getpid(), n_threads),
    )
    try:
        of_future = {pool.submit(do_job, job, store): job for job in jobs}
        for future in as_completed(of_future):
            yield of_future[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def start_process(parent: int, n_threads: int) -> None:
    """Set up a worker process: its number of threads, and that it ends with its parent."""
    torch.set_num_threads(n_threads)
    silence_libraries()
    Thread(target=exit_with_parent, args=(parent,), daemon=True).start()


def jobs_of(task: RefereeTask, overrides: Sequence[str]) -> Iterator[Job]:
    """Yield the jobs of a comparison, by rows, then seed, then method."""
    names = method_names() if task.methods is None else task.methods
    for rows in [None] if task.rows is None else task.rows:
        for seed in task.seeds:
            for name in names:
                how: dict[str, Any] = {"n_trials": task.trials, "halvings": task.halvings}
                method = read_method(name, rows, overrides, seed=seed, **how)
                shown = rows_name(rows, method.config)
                asked = (tuple(task.shots), task.draws)
                yield Job(shown, method, seed, *asked, fingerprint(method, task))


def rows_name(rows: str | None, config: RunConfig) -> str:
    """Return the name of the rows: their experiment's, or their file's."""
    if rows is not None:
        return rows.removeprefix("referee/")
    path = config.data.source.get("path")
    return str(config.resolved["data"]["name"]) if path is None else Path(path).name.split(".")[0]


def fingerprint(method: Method, task: RefereeTask) -> str:
    """Hash what determines a job's result: its trials, when they stop, the file of rows, and the shots."""
    path = Path(str(method.config.data.source.get("path")))
    file = blake2b(path.read_bytes()).hexdigest() if path.is_file() else ""
    aside = ("run_dir", "cache_dir", "logger", "plan_for", "samples")
    settings = [
        {name: value for name, value in trial.config.resolved.items() if name not in aside}
        for trial in method.trials
    ]
    return content_hash(settings, list(task.halvings), file, list(task.shots), task.draws)
