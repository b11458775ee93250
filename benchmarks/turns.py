"""Processes that train in turns, a few steps each, and report what a turn took."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from resident import resident
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


class Turns:
    """Called after every step: waits for orders when it has taken the steps it was told to."""

    def __init__(self) -> None:
        self.left = self.told = 0
        self.began = 0.0
        self.counter: Any = None

    def step_over(self) -> None:
        """Report when the turn is over, then wait for the next."""
        self.left -= 1
        if self.left > 0:
            return
        if self.told > 0:
            seconds = time.perf_counter() - self.began
            self._report(seconds)
        order = sys.stdin.readline().split()
        if len(order) == 0:  # the parent has ended
            sys.exit(0)
        self.told = self.left = int(order[1])
        if order[0] == "count":
            self.counter = flop_counter()
            self.counter.__enter__()
        self.began = time.perf_counter()

    def _report(self, seconds: float) -> None:
        flops = None
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            flops, self.counter = self.counter.get_total_flops(), None
        say(seconds=seconds, steps=self.told, flops=flops, **memory())


def flop_counter() -> Any:
    """Counts operations of matrix products and of attention, what is computed a second time left out."""

    def product(_y: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    def forward(q: Any, k: Any, v: Any, _dropout: Any = 0, causal: Any = False, **_: Any) -> int:
        return sdpa_flop_count(q, k, v) // (2 if causal else 1)

    def backward(_dy: Any, q: Any, k: Any, v: Any, *others: Any, **_: Any) -> int:
        _y, _lse, dropout, causal = others
        return 2 * forward(q, k, v, dropout, causal)

    aten: Any = torch.ops.aten
    missing = {  # torch's counter takes these for free
        aten.addmm_: product,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=missing)


def say(**values: Any) -> None:
    """One line of JSON to the parent."""
    print("@" + json.dumps(values), file=sys.__stdout__, flush=True)


def memory() -> dict[str, float]:
    """Resident memory of this process now and at its highest, in MiB."""
    if torch.cuda.is_available():
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return {"now": now / 2**20, "peak": peak / 2**20}
    found = resident()
    return {"now": found["held"], "peak": found["peak"]}


class Worker:
    """A process that trains by one method when told to."""

    def __init__(self, script: Path, name: str, folder: Path, pairs: Path) -> None:
        self.name = name
        self.log = (pairs.parent / f"{name}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(script), name, str(folder), str(pairs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.start: dict[str, Any] = {}

    def ready(self) -> None:
        """Wait until it is about to take its first step."""
        self.start = self._answer()

    def turn(self, steps: int, *, order: str = "time") -> dict[str, Any]:
        """Take `steps` steps; order "count" counts their operations too."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order} {steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        self.log.seek(0)
        raise RuntimeError(f"{self.name} ended early:\n{self.log.read()[-3000:]}")


@contextlib.contextmanager
def workers_of(scripts: dict[str, Path], folder: Path, pairs: Path) -> Iterator[list[Worker]]:
    """Workers by name and script, which end with this context."""
    workers: list[Worker] = []
    try:
        for name, script in scripts.items():
            workers.append(Worker(script, name, folder, pairs))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def take_turns(
    workers: list[Worker], *, steps: int, n_turns: int
) -> dict[str, list[dict[str, Any]]]:
    """What each worker's turns of so many steps took, by name, after a turn of each to warm up."""
    found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for worker in workers:
        worker.ready()
    for turn in range(1 + n_turns):
        for worker in workers:
            taken = worker.turn(steps)
            if turn > 0:
                found[worker.name].append(taken)
    return found


def matmul_peak(dtype: str) -> float:
    """Floating-point operations a second of the fastest of some large matrix products."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if device == "cuda" else 2048
    left = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        left @ left
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best
