"""A real SIGKILL in mid-training, through the real entry point."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from runs import ENVIRONMENT, command, launch

ARGUMENTS = [
    "experiment=smoke",
    "trainer.progress=false",
    "trainer.max_epochs=3",
    "trainer.checkpoint_every_n_steps=1",
    "data.batch_size=32",
    "backbone.trainable=lora",
    "backbone.lora.dropout=0.1",  # random state must go on, too
]
STEPS_BEFORE_THE_KILL = 17  # of 15 an epoch


def weights(run_dir: Path) -> dict[str, bytes]:
    files = (run_dir / "export").glob("*.safetensors")
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.slow
def test_sigterm_is_said_and_is_no_success(tmp_path: Path, cache_dir: Path) -> None:
    run = tmp_path / "run"
    given = [*ARGUMENTS, "trainer.max_epochs=9999", f"cache_dir={cache_dir}", f"run_dir={run}"]
    line = command("train", *given)
    process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (run / "checkpoints/last.ckpt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM after step " in said and "ckpt=last goes on" in said
    assert process.returncode == 128 + signal.SIGTERM
    assert not (run / "results.json").exists()


@pytest.mark.long
def test_weights_are_those_of_the_unbroken_run(tmp_path: Path, cache_dir: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = [*ARGUMENTS, f"cache_dir={cache_dir}"]
    launch("train", *arguments, f"run_dir={whole}")

    line = command("train", *arguments, f"run_dir={cut}")
    process = subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    last, written, stamp = cut / "checkpoints/last.ckpt", 0, 0
    while process.poll() is None and written < STEPS_BEFORE_THE_KILL:
        if last.exists() and last.stat().st_mtime_ns != stamp:
            stamp, written = last.stat().st_mtime_ns, written + 1
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = torch.load(last, weights_only=True)["global_step"]
    assert STEPS_BEFORE_THE_KILL <= step < 45

    launch("train", *arguments, f"run_dir={cut}", "ckpt=last")
    assert len(weights(whole)) == 2
    assert weights(cut) == weights(whole)
