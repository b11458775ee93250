"""Two CPU processes, by ZeRO stage 3 and by DDP, through the real train.py, against one process."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from runs import ENVIRONMENT, ROOT, TINY, command, launch, save_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from plrhf.training.zero import Stage3

STEPS = 11  # of 5 an epoch
SETTINGS = [
    *TINY,
    *("backbone.lora.dropout=0", "optim.schedule=constant", "trainer.max_epochs=null"),
    *("trainer.log_every_n_steps=1", "trainer.val_every_n_steps=3"),
]
MODELS = {
    "reward": ["model=reward", "aggregator=soft_prompt", "backbone.gradient_checkpointing=true"],
    "dpo": ["model=dpo", "aggregator=film", "encoder=cluster", "encoder.n_clusters=3"],
}
MODELS["reward"] += ["aggregator.n_tokens=2", "encoder.rank=null", "encoder.init=vocabulary"]
MODELS["dpo"] += ["shrinkage=learned", "aggregator.shrinkage=learned", "aggregator.user_dim=3"]
ON = {
    "one": ["trainer=cpu"],
    "zero3": ["trainer=zero3_cpu", "trainer.zero3.persistent_below=0"],
    "ddp": ["trainer=cpu", "trainer.devices=2"],
}


def train(run_dir: Path, *overrides: str) -> None:
    extensions = run_dir.with_name("extensions")
    done = subprocess.run(
        command("train", *overrides, f"run_dir={run_dir}"),
        env={**ENVIRONMENT, "TORCH_EXTENSIONS_DIR": str(extensions)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not extensions.exists()  # a run killed while building one would block all later runs
    assert "WARNING" not in done.stdout and done.stderr == ""


def train_killed(rank: int, run_dir: Path, *overrides: str) -> int:
    """Train, and kill the process of a rank once it has saved; the step at which it left the run."""
    last = run_dir / "checkpoints/last.ckpt"
    before = last.stat().st_mtime_ns if last.is_file() else 0
    process = subprocess.Popen(
        command("train", *overrides, f"run_dir={run_dir}"),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (last.is_file() and last.stat().st_mtime_ns > before):
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
    return int(torch.load(last, weights_only=True)["global_step"])


def losses(run_dir: Path, name: str) -> list[float]:
    with (run_dir / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name] != ""]


def runs_still(process: int) -> bool:
    """Whether a process is there and not just waiting to be collected."""
    stat = Path(f"/proc/{process}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def forget_texts(cache_dir: Path) -> None:
    """Remove what was computed of texts, that a run may compute it anew."""
    for found in cache_dir.glob("texts-*"):
        shutil.rmtree(found)


def kept_texts(cache_dir: Path) -> list[Path]:
    return sorted(cache_dir.glob("texts-*/values-*"))


@pytest.mark.long
def test_a_reward_model_learns_what_one_process_learns_through_kills(
    tmp_path: Path, cache_dir: Path
) -> None:
    """By ZeRO until its first process is killed, then by DDP until its second is."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [*SETTINGS, *MODELS["reward"], f"trainer.max_steps={STEPS}"]
    settings.append(f"cache_dir={cache_dir}")
    forget_texts(cache_dir)
    launch("train", *settings, *ON["one"], f"run_dir={one}")
    settings.append("trainer.checkpoint_every_n_steps=1")
    step = train_killed(0, two, *settings, *ON["zero3"])
    later = train_killed(1, two, *settings, *ON["ddp"], "ckpt=last")
    assert 1 <= step < later < STEPS
    train(two, *settings, *ON["ddp"], "ckpt=last")
    assert kept_texts(cache_dir) == []  # behind a soft prompt nothing of a text stays the same
    assert_same_runs(one, two)


@pytest.mark.long
def test_a_policy_learns_what_one_process_learns_on_any_processes(
    tmp_path: Path, cache_dir: Path
) -> None:
    """By DDP, then by ZeRO, then on one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [*SETTINGS, *MODELS["dpo"], f"cache_dir={cache_dir}"]
    to_the_end = [*settings, *ON["one"], f"trainer.max_steps={STEPS}"]
    launch("train", *to_the_end, f"run_dir={one}")
    forget_texts(cache_dir)  # two processes compute them anew, and share them
    train(two, *settings, *ON["ddp"], "trainer.max_steps=4")
    kept = kept_texts(cache_dir)
    assert len(kept) == 3  # of train, val and test
    train(two, *settings, *ON["zero3"], "trainer.max_steps=8", "ckpt=last")
    launch("train", *to_the_end, f"run_dir={two}", "ckpt=last")
    assert kept_texts(cache_dir) == kept  # all was found
    assert_same_runs(one, two)


@pytest.mark.long
@pytest.mark.slow
def test_an_online_policy_learns_what_one_process_learns(
    reward_run: Path, tmp_path: Path, cache_dir: Path
) -> None:
    """By DDP, then on one process; each process samples for its part of a batch."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [*SETTINGS, "model=grpo", f"model.reward={reward_run}", "model.group_size=3"]
    settings += ["model.max_new_tokens=4", "model.n_updates=2", "data.batch_size=5"]
    settings += ["aggregator=film", "optim.lr=1e-2", "trainer.max_steps=6"]
    settings.append(f"cache_dir={cache_dir}")
    launch("train", *settings, *ON["one"], f"run_dir={one}")
    train(two, *settings, *ON["ddp"], "trainer.max_steps=4")
    launch("train", *settings, *ON["one"], f"run_dir={two}", "ckpt=last")
    judged = [
        f"{split}/{name}" for split in ("train", "val") for name in ("reward", "kl", "length")
    ]
    assert_same_runs(one, two, ("train/loss", "train/clipped", "val/loss", *judged), n_steps=6)
    assert max(losses(one, "train/kl")) > 1e-3


LEARNED = ("train/loss", "train/accuracy", "val/loss", "val/accuracy_macro")


def leaves(value: Any, place: str = "") -> tuple[dict[str, float], dict[str, Any]]:
    """The fractional numbers of nested mappings and lists, and all else that is in them, by their place."""
    numbers: dict[str, float] = {}
    others: dict[str, Any] = {}
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        others[place] = len(value)
        for key, one in inner:
            for found, all_found in zip(
                leaves(one, f"{place}/{key}"), (numbers, others), strict=True
            ):
                all_found.update(found)
    else:
        (numbers if isinstance(value, float) else others)[place] = value
    return numbers, others


def assert_same_runs(
    one: Path, two: Path, metrics: Sequence[str] = LEARNED, *, n_steps: int = STEPS
) -> None:
    """Two runs learned the same, but for how sums over processes round."""
    assert len(losses(one, "train/loss")) == n_steps
    for metric in metrics:
        # At first the policy is all but its reference, and the sign of a margin is rounding.
        first = 3 if metric == "train/accuracy" else 0
        expected, found = (losses(run, metric)[first:] for run in (one, two))
        assert found == pytest.approx(expected, abs=1e-4), metric
    results = [json.loads((run / "results.json").read_text()) for run in (one, two)]
    for own in ("config", "run", "provenance", "digest"):  # which say where and how it was made
        assert results[0].pop(own) != results[1].pop(own)
    numbers, others = zip(*map(leaves, results), strict=True)
    assert others[0] == others[1]
    assert numbers[0] == pytest.approx(numbers[1], abs=1.01e-4)  # which have four decimals
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


@pytest.mark.long
def test_a_supervised_model_learns_what_one_process_learns(tmp_path: Path, cache_dir: Path) -> None:
    """On one process first, and by ZeRO to the end, whose export replaces the first one."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [*SETTINGS, "model=sft", "data.batch_size=15", "optim.lr=1e-3"]
    settings += [f"backbone.path={save_model(tmp_path / 'model')}", "trainer.max_steps=7"]
    settings.append(f"cache_dir={cache_dir}")
    launch("train", *settings, *ON["one"], f"run_dir={one}")
    launch("train", *settings, *ON["one"], f"run_dir={two}", "trainer.max_steps=3")
    train(two, *settings, *ON["zero3"], "ckpt=last")
    for metric in ("train/loss", "val/loss"):
        assert losses(two, metric) == pytest.approx(losses(one, metric), abs=1e-4), metric
    models = [AutoModelForCausalLM.from_pretrained(run / "export") for run in (one, two)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, atol=1e-4, rtol=0, msg=key)


@pytest.mark.long
@pytest.mark.slow
def test_reading_into_shards_takes_little_more_memory_than_they(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    script = str(ROOT / "benchmarks" / "loading.py")
    subprocess.run([sys.executable, script, "--out", str(out)], env=ENVIRONMENT, check=True)
    found = json.loads(out.read_text())
    assert found["files"] > 3
    for process in found["processes"]:
        assert process["model"] > 450
        assert process["above"] > 0.4 * process["model"]  # else it is not its half that is measured
        assert process["above"] < 0.6 * process["model"]


@pytest.mark.slow
def test_a_damaged_checkpoint_starts_no_processes(
    reward_run: Path, cache_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    run = Path(shutil.copytree(reward_run, tmp_path / "run"))
    last = run / "checkpoints/last.ckpt"
    bits = bytearray(last.read_bytes())
    weights = torch.load(last, weights_only=True)["state_dict"]
    largest = max(weights.values(), key=torch.Tensor.numel)
    bits[bits.index(largest.numpy().tobytes()[:64])] ^= 1
    for content in (bits[:-1000], bits, b"of another program"):
        last.write_bytes(content)
        capsys.readouterr()
        places = [f"cache_dir={cache_dir}", f"run_dir={run}"]
        with (
            patch.object(Stage3, "setup_environment", side_effect=AssertionError),
            pytest.raises(SystemExit) as stop,
        ):
            launch("train", *TINY, *ON["zero3"], *places, "ckpt=last")
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: ckpt='{str(last)[:20]}") and err.count("\n") == 1


@pytest.mark.long
def test_a_checkpoint_of_another_encoder_is_refused_once(
    reward_run: Path, cache_dir: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(reward_run, tmp_path / "run"))
    last = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["made_for"]["encoder"] = "another"
    torch.save(checkpoint, last)
    places = [f"cache_dir={cache_dir}", f"run_dir={run}"]
    done = subprocess.run(
        command("train", *TINY, *ON["zero3"], *places, "ckpt=last"),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: ckpt='made for encoder another' is not allowed: expected a checkpoint made for "
        "encoder lookup ("
    )
    assert done.stderr.count("\n") == 1
