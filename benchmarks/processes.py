"""Runs on one process and on two, whole and killed, and how far apart what they learn is.

    python benchmarks/processes.py same                        # both models, both aggregators
    python benchmarks/processes.py kills --processes 1         # one process, 20 kills
    python benchmarks/processes.py kills --processes 2         # two of ZeRO stage 3, either is killed
    python benchmarks/processes.py same --by ddp               # DDP in the place of ZeRO, kills too
    python benchmarks/processes.py kills --processes 1 2       # each start on another number of them

`same` trains 50 steps on one process and on two, of one global batch, and compares losses, margins
and results.json. `kills` sends SIGKILL at any time since the start, while a run trains, or while a
checkpoint is being written, by turns; after every kill all checkpoints must be whole and no process
may be left; the run then goes on and is killed again, until a start reaches the end and is compared
with the unbroken run. Exit status 1 where losses are further apart than 1e-4, or, between runs on
the same number of processes, losses or weights than 1e-6.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from plrhf.training.checkpoints import read_checkpoint

TRAIN = Path(__file__).parent.parent / "train.py"
SETTINGS = [
    *("data.n_users=5", "data.n_unseen_users=2", "data.pairs_per_user=14", "data.n_prompts=20"),
    *("data.val_pairs_per_user=3", "data.test_pairs_per_user=4", "data.batch_size=16"),
    *("backbone.tiny.width=32", "backbone.tiny.n_layers=2", "backbone.tiny.vocab_size=700"),
    *("backbone.sft.max_steps=5", "optim.warmup_steps=2", "optim.schedule=constant"),
    *("samples.users=2", "samples.prompts=2", "samples.max_new_tokens=4"),
    *("optim.lr=1e-3", "optim.user_lr=1e-2", "optim.head_lr=1e-2", "backbone.lora.dropout=0"),
    *("trainer.max_epochs=null", "trainer.val_every_n_steps=7", "trainer.log_every_n_steps=1"),
    "trainer.checkpoint_every_n_steps=1",
]
MODELS = [
    [f"model={model}", f"aggregator={aggregator}"]
    for aggregator in ("film", "soft_prompt")
    for model in ("dpo", "reward")
]
BY = {
    "zero3": ["trainer=zero3_cpu", "trainer.zero3.persistent_below=0"],
    "ddp": ["trainer=cpu", "trainer.devices=2"],
}
ON = {1: ["trainer=cpu"], 2: BY["zero3"]}
MOMENTS = ("any time", "training", "writing")


class Run:
    """A run of train.py on so many processes, in a directory that an earlier one may have left."""

    def __init__(self, run_dir: Path, cache_dir: Path, n_processes: int, more: list[str]) -> None:
        self.run_dir, self.n_processes = run_dir, n_processes
        self.last = run_dir / "checkpoints/last.ckpt"
        places = [f"run_dir={run_dir}", f"cache_dir={cache_dir}"]
        on = ["ckpt=last" if self.last.is_file() else "overwrite=true"]
        command = [sys.executable, str(TRAIN), *SETTINGS, *more, *ON[n_processes], *places, *on]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.began = time.monotonic()
        self.errors = run_dir.with_name("errors")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=errors
            )

    def ranks(self) -> list[int]:
        """The processes that train, by rank; those of higher rank start later."""
        own = self.process.pid
        children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        return [own, *map(int, children)]

    def wait_for(self, moment: str, draw: random.Random, whole: float, training: float) -> bool:
        """Wait for a moment in a run of `whole` seconds, `training` of them; whether it was met."""
        if moment == "any time":
            return self._until(lambda: False, draw.uniform(0, whole))
        stamp = self.last.stat().st_mtime_ns if self.last.is_file() else 0
        if not self._until(lambda: _stamp(self.last) not in (0, stamp), 10 * whole):
            return False
        if not self._until(lambda: False, draw.uniform(0, training)):
            return False
        return moment == "training" or self._until(self._is_writing, whole)

    def _is_writing(self) -> bool:
        """Whether a part of the next checkpoint is there."""
        return any(self.last.parent.glob(f"{self.last.name}.*.part"))

    def _until(self, condition: Any, seconds: float) -> bool:
        """Wait for a condition or for so long; False where the run ends before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(0.0005)
        return self.process.poll() is None

    def kill(self, draw: random.Random) -> tuple[int, float] | None:
        """Kill one of its processes; its rank, and after how many seconds none was left.

        None: the process had done its part, and the run came to its end.
        """
        ranks = self.ranks()
        rank = draw.randrange(len(ranks))
        os.kill(ranks[rank], signal.SIGKILL)
        began = time.monotonic()
        status = self.process.wait(timeout=100)
        if status == 0:
            return None  # what it left is compared with the unbroken run
        while any(_runs(process) for process in ranks[1:]):
            assert time.monotonic() < began + 100, "a process is left"
            time.sleep(0.01)
        return rank, time.monotonic() - began


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


def _runs(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def step_of(run_dir: Path) -> int:
    """The step of the last checkpoint, 0 without one; every checkpoint there must be whole."""
    steps = {
        path.name: read_checkpoint(path)["global_step"]
        for path in (run_dir / "checkpoints").glob("*.ckpt")
    }
    return steps.get("last.ckpt", 0)


@dataclass
class Learned:
    """What a finished run left."""

    losses: dict[tuple[str, int], float]  # by name and step
    state: dict[str, torch.Tensor]
    margins: pd.DataFrame
    results: dict[str, Any]

    @classmethod
    def of(cls, run_dir: Path) -> Learned:
        """Read what a run left."""
        with (run_dir / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        losses = {
            (name, int(row["step"])): float(row[name])
            for row in rows
            for name in ("train/loss", "val/loss")
            if row[name] != ""
        }
        results = json.loads((run_dir / "results.json").read_text())
        for own in ("config", "run", "provenance", "digest"):  # where and how it was made
            del results[own]
        last = read_checkpoint(run_dir / "checkpoints/last.ckpt")
        table = pd.read_parquet(run_dir / "predictions.parquet")
        return cls(losses, last["state_dict"], table, results)

    def apart(self, other: Learned) -> dict[str, Any]:
        """Largest differences."""
        common = self.losses.keys() & other.losses.keys()
        weights = [(other.state[n] - value).abs().max() for n, value in self.state.items()]
        return {
            "losses": len(common),
            "loss": max(abs(self.losses[at] - other.losses[at]) for at in common),
            "weight": float(torch.stack(weights).max()),
            "margin": float((self.margins["margin"] - other.margins["margin"]).abs().max()),
            "results_equal": self.results == other.results,
        }


def unbroken_run(run: Run) -> tuple[Learned, float, float]:
    """What a run learns that nobody kills, its seconds, and those of its training, about."""
    while run.process.poll() is None and not run.last.is_file():
        time.sleep(0.001)
    first = time.monotonic()
    assert run.process.wait() == 0, run.errors.read_text()
    end = time.monotonic()
    return Learned.of(run.run_dir), end - run.began, (end - first) / 2


def same(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each model on one process and on two."""
    found = {}
    for model in MODELS[: args.models]:
        name = "-".join(one.partition("=")[2] for one in model)
        runs = []
        for n_processes in ON:
            run_dir, cache_dir = folder / f"{name}-{n_processes}" / "run", folder / f"{n_processes}"
            run_dir.parent.mkdir()
            more = [*model, f"trainer.max_steps={args.steps}", *args.settings]
            runs.append(unbroken_run(Run(run_dir, cache_dir, n_processes, more))[0])
        found[name] = runs[0].apart(runs[1])
        print(f"{name}: {found[name]}", flush=True)
    return found


def broken_runs(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill until there were `args.kills`, and let the last run reach its end."""
    draw = random.Random(args.seed)
    cache_dir = folder / "cache"
    settings = [f"trainer.max_steps={args.steps}", *args.settings]
    (folder / "unbroken").mkdir()
    first = Run(folder / "unbroken" / "run", cache_dir, args.processes[0], settings)
    unbroken, whole, training = unbroken_run(first)
    print(f"unbroken: {whole:.0f} s", flush=True)
    kills: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    while len(kills) < args.kills:
        run_dir = folder / f"broken-{len(ends)}" / "run"
        run_dir.parent.mkdir()
        while True:
            run = Run(run_dir, cache_dir, draw.choice(args.processes), settings)
            moment = MOMENTS[len(kills) % len(MOMENTS)]
            killed = None
            if len(kills) < args.kills and run.wait_for(moment, draw, whole, training / 3):
                killed = run.kill(draw)
            if killed is not None:
                rank, seconds = killed
                kill = {"moment": moment, "processes": run.n_processes, "rank": rank}
                cut = [one.name for one in run_dir.glob("checkpoints/*.part")]
                kills.append({**kill, "step": step_of(run_dir), "cut": cut, "ended_after": seconds})
                print(f"kill {len(kills)}: {kills[-1]}", flush=True)
            elif run.process.wait() == 0:
                break
            else:
                raise AssertionError(run.errors.read_text())
        ends.append(unbroken.apart(Learned.of(run_dir)))
        print(f"went on to the end: {ends[-1]}", flush=True)
    return {"kills": kills, "ends": ends}


def main() -> None:
    """Run, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("same", "kills"))
    parser.add_argument("--steps", type=int, help="50 for same, 25 for kills")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[2], choices=sorted(ON))
    parser.add_argument("--by", default="zero3", choices=list(BY), help="how two work together")
    parser.add_argument("--models", type=int, default=len(MODELS), help="how many, for same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="*", default=[], help="further settings of train.py")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ON[2] = BY[args.by]
    if args.steps is None:
        args.steps = 50 if args.what == "same" else 25
    with tempfile.TemporaryDirectory() as folder:
        found = (same if args.what == "same" else broken_runs)(args, Path(folder))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    ends = found["ends"] if args.what == "kills" else list(found.values())
    most = {name: max(end[name] for end in ends) for name in ("loss", "weight")}
    print(f"at most {most}")
    alike = args.what == "kills" and len(args.processes) == 1
    sys.exit(int(max(most.values()) > 1e-6 if alike else most["loss"] > 1e-4))


if __name__ == "__main__":
    main()
