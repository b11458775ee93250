"""How fast eval=referee trains beside train.py on the same trials, one after the other.

python benchmarks/referee.py --path DIR                  # Polis, lookup, 12 trials against 2 runs
python benchmarks/referee.py --path DIR --rows referee/llmfao --method cluster

Both read features from the same cache. It prints CPU seconds a trial of each, on one thread, so that other
work on the machine does not matter much, the ratio, and the largest difference of test margins.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", required=True, help="directory of the backbone")
    parser.add_argument("--rows", default="referee/polis")
    parser.add_argument("--method", default="lookup")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--sample", type=int, default=2, help="trials that train.py does too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(given, Path(folder))


def compare(given: argparse.Namespace, folder: Path) -> None:
    """Time the referee on all trials, and train.py on the best one and some others."""
    asked = [f"eval.rows=[{given.rows}]", f"eval.methods=[{given.method}]", "eval.shots=[0]"]
    asked += [f"eval.trials={given.trials}", f"backbone.path={given.path}"]
    command(
        "eval", "eval=referee", *asked, "eval.trials=1", f"out={folder}/warm"
    )  # fills the cache
    ours = command("eval", "eval=referee", *asked, f"out={folder}/referee")
    (job,) = folder.glob("referee/jobs/*/*/*/job.json")
    record = pd.read_json(job, typ="series")
    points = [one["point"] for one in record["trials"]]
    chosen = [record["best"], *(n for n in range(len(points)) if n != record["best"])]
    seconds = []
    for number in chosen[: given.sample]:
        settings = [f"{name}={value}" for name, value in points[number].items()]
        experiment = f"experiment=[method/{given.method},{given.rows}]"
        where = [f"backbone.path={given.path}", f"run_dir={folder}/run-{number}"]
        seconds.append(command("train", experiment, *settings, *where))
    plain = float(np.mean(seconds))
    theirs = pd.read_parquet(folder / f"run-{record['best']}/predictions.parquet")
    apart = largest_difference(pd.read_parquet(job.parent / "margins.parquet"), theirs)
    print(
        "| method | referee, CPU s a trial | train.py, CPU s a trial | times as fast | margins apart |"
    )
    print("|---|---:|---:|---:|---:|")
    ratio = plain * len(points) / ours
    print(
        f"| {given.method} | {ours / len(points):.2f} | {plain:.2f} | {ratio:.1f} | {apart:.1e} |"
    )


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
