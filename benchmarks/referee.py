"""How fast eval=referee trains methods beside train.py on the same trials, one after the other.

python benchmarks/referee.py --path DIR                  # Polis, five methods of 12 trials, a run of each
python benchmarks/referee.py --path DIR --rows referee/llmfao --methods lookup --sample 2

Both read features from the same cache. It prints CPU seconds a trial of each, on one thread, so that other
work on the machine does not matter much, the ratio, and the largest difference of test margins. The last
line is the whole command: all trials of all methods, and as many runs of train.py as they would take.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
METHODS = "vanilla,lookup,cluster,lore,rfm"


def main() -> None:
    """Run both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", required=True, help="directory of the backbone")
    parser.add_argument("--rows", default="referee/polis")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--sample", type=int, default=1, help="trials that train.py does too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(given, Path(folder))


def compare(given: argparse.Namespace, folder: Path) -> None:
    """Time the referee on all trials, and train.py on the best one of each method and some others."""
    names = given.methods.split(",")
    asked = [f"eval.rows=[{given.rows}]", "eval.shots=[0]", f"backbone.path={given.path}"]
    # This one fills the cache.
    command(
        "eval",
        "eval=referee",
        *asked,
        "eval.methods=[vanilla]",
        "eval.trials=1",
        f"out={folder}/warm",
    )
    asked += [f"eval.methods=[{given.methods}]", f"eval.trials={given.trials}"]
    ours = command("eval", "eval=referee", *asked, f"out={folder}/referee")
    print("| method | trials | referee, CPU s | train.py, CPU s | times as fast | margins apart |")
    print("|---|---:|---:|---:|---:|---:|")
    n_trials, plain = 0, 0.0
    for name in names:
        (job,) = folder.glob(f"referee/jobs/*/{name}/*/job.json")
        record = pd.read_json(job, typ="series")
        run, apart = by_train(given, name, record, folder)
        count = len(record["trials"])
        print(line(name, count, record["seconds"], run, f"{apart:.1e}"))
        n_trials, plain = n_trials + count, plain + count * run
    print(line("all, with start and report", n_trials, ours, plain / n_trials, ""))


def line(name: str, count: int, ours: float, run: float, apart: str) -> str:
    """Return a line of the table: `ours` CPU seconds for `count` trials, `run` for a run of train.py."""
    each = ours / count
    return f"| {name} | {count} | {each:.2f} | {run:.2f} | {run / each:.1f} | {apart} |"


def by_train(
    given: argparse.Namespace, name: str, record: Any, folder: Path
) -> tuple[float, float]:
    """Run train.py on the best trial of a method and others; return CPU seconds a run, margins apart."""
    points = [one["point"] for one in record["trials"]]
    chosen = [record["best"], *(n for n in range(len(points)) if n != record["best"])]
    seconds = []
    for number in chosen[: given.sample]:
        settings = [f"{key}={value}" for key, value in points[number].items()]
        settings = [one.replace("=None", "=null") for one in settings]
        experiment = f"experiment=[method/{name},{given.rows}]"
        where = [f"backbone.path={given.path}", f"run_dir={folder}/{name}-{number}"]
        seconds.append(command("train", experiment, *settings, *where))
    if record["features"] != "text":  # train.py reads texts
        return float(np.mean(seconds)), np.nan
    theirs = pd.read_parquet(folder / f"{name}-{record['best']}/predictions.parquet")
    (margins,) = folder.glob(f"referee/jobs/*/{name}/*/margins.parquet")
    return float(np.mean(seconds)), largest_difference(pd.read_parquet(margins), theirs)


def largest_difference(ours: pd.DataFrame, theirs: pd.DataFrame) -> float:
    """Return how far apart margins on test pairs of seen users are at most."""
    taken = (ours["user_kind"] == "seen") & (ours["who"] == "own")
    own = ours[taken].set_index("pair_id")["margin"]
    mask = (theirs["split"] == "test") & (theirs["context"] == "user")
    other = theirs[mask & (theirs["user_kind"] == "seen")].set_index("pair_id")["margin"]
    return float((own - other.loc[own.index]).abs().max())


def command(entry: str, *overrides: str) -> float:
    """Run train.py or eval.py on one thread; return its CPU seconds."""
    before = cpu_seconds()
    words = [sys.executable, str(ROOT / f"{entry}.py"), *overrides]
    subprocess.run(
        words,
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return cpu_seconds() - before


def cpu_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
