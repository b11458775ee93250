"""ZeRO stage 3 on two CPU processes, through the real train.py, against one process."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from runs import ENVIRONMENT, ROOT, TINY, command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from plrhf.errors import BadValue
from plrhf.training import build_trainer

STEPS, MORE_STEPS = 6, 11  # of 5 an epoch
SETTINGS = [
    *TINY,
    *("backbone.lora.dropout=0", "optim.schedule=constant", "trainer.max_epochs=null"),
    *("trainer.log_every_n_steps=1", "trainer.val_every_n_steps=3"),
]
MODELS = {
    "reward": ["model=reward", "aggregator=film", "backbone.gradient_checkpointing=true"],
    "dpo": ["model=dpo", "aggregator=soft_prompt", "aggregator.n_tokens=2", "encoder=cluster"],
}
MODELS["dpo"] += ["encoder.init=vocabulary", "encoder.n_clusters=3"]
ON = {1: ["trainer=cpu"], 2: ["trainer=zero3_cpu", "trainer.zero3.persistent_below=0"]}


def train(run_dir: Path, cache_dir: Path, *overrides: str) -> None:
    places = (f"run_dir={run_dir}", f"cache_dir={cache_dir}")
    extensions = run_dir.with_name("extensions")
    done = subprocess.run(
        command("train", *overrides, *places),
        env={**ENVIRONMENT, "TORCH_EXTENSIONS_DIR": str(extensions)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not extensions.exists()  # a run killed while building one would block all later runs
    assert "WARNING" not in done.stdout and done.stderr == ""


def losses(run_dir: Path, name: str) -> list[float]:
    with (run_dir / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name] != ""]


def runs_still(process: int) -> bool:
    """Whether a process is there and not just waiting to be collected."""
    stat = Path(f"/proc/{process}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "then_on"), [("reward", 2), ("dpo", 1)])
def test_two_processes_learn_what_one_learns(
    name: str, then_on: int, tmp_path: Path, cache_dir: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    settings, to_the_end = [*SETTINGS, *MODELS[name]], f"trainer.max_steps={MORE_STEPS}"
    train(one, cache_dir, *settings, *ON[1], to_the_end)
    train(two, cache_dir, *settings, *ON[2], f"trainer.max_steps={STEPS}")
    train(two, cache_dir, *settings, *ON[then_on], to_the_end, "ckpt=last")

    assert len(losses(one, "train/loss")) == MORE_STEPS
    for metric in ("train/loss", "train/accuracy", "val/loss", "val/accuracy_macro"):
        expected = losses(one, metric)
        assert losses(two, metric) == pytest.approx(expected, abs=1e-4), metric
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    assert results[0]["data"] == results[1]["data"]
    tables = [pd.read_parquet(run / "predictions.parquet") for run in (one, two)]
    assert (tables[0]["margin"] - tables[1]["margin"]).abs().max() < 1e-4
    rest = [table.drop(columns="margin") for table in tables]
    pd.testing.assert_frame_equal(*rest)
    weights = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (one, two)]
    assert weights[0]["state_dict"].keys() == weights[1]["state_dict"].keys()
    for file in ("adapter_model.safetensors", "user_encoder.safetensors"):
        exported = [load_file(run / "export" / file) for run in (one, two)]
        assert exported[0].keys() == exported[1].keys()
        for key, value in exported[0].items():
            torch.testing.assert_close(exported[1][key], value, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_supervised_on_two_processes(tmp_path: Path, cache_dir: Path) -> None:
    first = tmp_path / "first"
    settings = [*SETTINGS, "model=sft", "data.batch_size=15", "optim.lr=1e-3"]
    train(first, cache_dir, *settings, *ON[1], "trainer.max_steps=2")
    settings.append(f"backbone.path={first / 'export'}")
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, cache_dir, *settings, *ON[1], "trainer.max_steps=7")
    train(two, cache_dir, *settings, *ON[2], "trainer.max_steps=4")
    train(two, cache_dir, *settings, *ON[2], "trainer.max_steps=7", "ckpt=last")
    for metric in ("train/loss", "val/loss"):
        assert losses(two, metric) == pytest.approx(losses(one, metric), abs=1e-4), metric
    models = [AutoModelForCausalLM.from_pretrained(run / "export") for run in (one, two)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, atol=1e-4, rtol=0, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_and_the_run_goes_on(
    rank: int, tmp_path: Path, cache_dir: Path
) -> None:
    settings = [*SETTINGS, *MODELS["reward"], *ON[2], "trainer.checkpoint_every_n_steps=1"]
    settings += [f"trainer.max_steps={3 * MORE_STEPS}", f"cache_dir={cache_dir}"]
    run = tmp_path / "run"
    process = subprocess.Popen(
        command("train", *settings, f"run_dir={run}"), env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    last = run / "checkpoints/last.ckpt"
    while process.poll() is None and not last.is_file():
        time.sleep(0.002)
    assert process.poll() is None
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill((process.pid, int(child))[rank], signal.SIGKILL)
    assert process.wait() != 0
    for _ in range(600):
        if not runs_still(int(child)):
            break
        time.sleep(0.1)
    assert not runs_still(int(child))
    step = torch.load(last, weights_only=True)["global_step"]
    assert 1 <= step < 3 * MORE_STEPS
    settings[-2] = f"trainer.max_steps={step + 2}"
    train(run, cache_dir, *settings, "ckpt=last")
    assert torch.load(last, weights_only=True)["global_step"] == step + 2


def test_more_processes_need_zero(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="trainer.devices=2 is not allowed: expected 1 without ZeRO"):
        build_trainer(run_dir=tmp_path, loggers=[], has_val=True, max_epochs=1, devices=2)


def test_deepspeed_is_loaded_for_sharded_runs_alone() -> None:
    code = "import sys, plrhf.run; print('deepspeed' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert out.stdout.split() == ["False"]
