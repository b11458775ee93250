"""How long a report and comparisons of many users or many runs take, and how large their pages are.

    python train.py experiment=smoke run_dir=runs/smoke
    python benchmarks/large_reports.py runs/smoke

The run is a template: its predictions are repeated for other users, with margins drawn anew, and all files
that are read are written as a run writes them. One process; seconds are of the CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from plrhf.evaluation.results import read_results, summarise_run, write_evaluation
from plrhf.reporting.comparison_page import compare
from plrhf.reporting.report import write_report

PAIRS = 10  # of each user in test
CONTEXTS = ("user", "generic", "oracle")


def predictions_of(n_users: int, *, seed: int, gain: float) -> pd.DataFrame:
    """Predictions for so many users, of which a tenth is unseen.

    Args:
        gain: mean margin in user context less 0.3; in the generic one it is a third of it. With 0 the
            run is vanilla.
    """
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(n_users), PAIRS)
    base = pd.DataFrame(
        {
            "split": np.where(np.arange(len(user)) % PAIRS == 0, "val", "test"),
            "user_kind": np.where(user % 10 == 9, "unseen", "seen"),
            "prompt_kind": "unseen",
            "user_id": np.char.add("user-", user.astype(str)).astype(object),
            "pair_id": np.char.add("pair-", np.arange(len(user)).astype(str)).astype(object),
            "prompt_id": np.char.add("prompt-", (np.arange(len(user)) % 997).astype(str)),
            "chosen_tokens": rng.integers(5, 60, len(user)),
            "rejected_tokens": rng.integers(5, 60, len(user)),
        }
    )
    base = base[(base["split"] == "test") | (base["user_kind"] == "seen")]
    parts = []
    for context, strength in zip(CONTEXTS, (1.0, 1 / 3, 1.5), strict=True):
        margin = rng.normal(0.3 + strength * gain, 1.0, len(base))
        parts.append(base.assign(context=context, margin=margin, correct=(margin > 0) * 1.0))
    return pd.concat(parts, ignore_index=True)


def make_run(directory: Path, template: Path, n_users: int, *, seed: int, gain: float) -> Path:
    """Write the files of a run with so many users, as far as reports read them."""
    directory.mkdir(parents=True)
    before = read_results(template)
    for name in ("config.yaml", "users.json", "metrics.csv"):
        if (template / name).is_file():
            shutil.copyfile(template / name, directory / name)
    config = json.loads(json.dumps(before.config))
    config["seed"] = config["data"]["seed"] = seed
    kind = "NoneEncoder" if gain == 0 else "LookupEncoder"  # vanilla, with which others are paired
    config["encoder"] = {"name": f"encoder-{gain:g}", "_target_": f"plrhf.encoders.{kind}"}
    found = predictions_of(n_users, seed=seed, gain=gain)
    assert before.provenance is not None
    results = summarise_run(
        found,
        config=config,
        counts=before.data,
        probes=before.probes,
        run=before.run,
        provenance=before.provenance,
    )
    write_evaluation(directory, results, found)
    return directory


def timed(work: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("template", type=Path)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=45)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        large = [
            make_run(folder / f"large-{n}", options.template, options.users, seed=0, gain=gain)
            for n, gain in enumerate((0.0, 0.5))
        ]
        seconds = timed(lambda: write_report(large[0]))
        size = (large[0] / "report.html").stat().st_size
        print(f"report of {options.users:,} users: {seconds:.1f} s, {size / 1e6:.2f} MB")
        seconds = timed(lambda: compare(large, folder / "two"))
        size = (folder / "two" / "report.html").stat().st_size
        print(f"comparison of 2 such runs: {seconds:.1f} s, {size / 1e6:.2f} MB")
        small = [
            make_run(folder / f"small-{n}", options.template, 200, seed=n % 3, gain=0.1 * (n // 3))
            for n in range(options.runs)
        ]
        seconds = timed(lambda: compare(small, folder / "many"))
        size = (folder / "many" / "report.html").stat().st_size
        print(
            f"comparison of {options.runs} runs of 200 users: {seconds:.1f} s, {size / 1e6:.2f} MB"
        )


if __name__ == "__main__":
    main()
