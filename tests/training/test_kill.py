"""A real SIGKILL in mid-training, through the real entry point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ARGUMENTS = [
    "train.py",
    "experiment=smoke",
    "trainer.progress=false",
    "trainer.max_epochs=4",
    "trainer.checkpoint_every_n_steps=1",
    "data.batch_size=32",
    "backbone.trainable=lora",
    "backbone.lora.dropout=0.1",  # random state must go on, too
]
STEPS_BEFORE_THE_KILL = 20  # of 15 an epoch


def start(*overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, *ARGUMENTS, *overrides]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # tests run side by side
    return subprocess.Popen(command, cwd=ROOT, env=one_thread, stdout=subprocess.DEVNULL)


def weights(run_dir: Path) -> dict[str, bytes]:
    files = (run_dir / "export").glob("*.safetensors")
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.slow
def test_weights_are_those_of_the_unbroken_run(tmp_path: Path) -> None:
    cache, whole, cut = f"cache_dir={tmp_path / 'cache'}", tmp_path / "whole", tmp_path / "cut"
    assert start(cache, f"run_dir={whole}").wait() == 0

    process = start(cache, f"run_dir={cut}")
    last, written, stamp = cut / "checkpoints/last.ckpt", 0, 0
    while process.poll() is None and written < STEPS_BEFORE_THE_KILL:
        if last.exists() and last.stat().st_mtime_ns != stamp:
            stamp, written = last.stat().st_mtime_ns, written + 1
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = torch.load(last, weights_only=True)["global_step"]
    assert STEPS_BEFORE_THE_KILL <= step < 60

    assert start(cache, f"run_dir={cut}", "ckpt=last").wait() == 0
    assert len(weights(whole)) == 2
    assert weights(cut) == weights(whole)
