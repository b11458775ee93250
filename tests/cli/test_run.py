"""train.py from its command line to its run directory."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from runs import (
    ENVIRONMENT,
    TINY,
    check_run,
    composed,
    evaluation_of,
    launch,
    rows_of_world,
    save_model,
    write_rows,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from transformers import AutoModelForCausalLM, AutoTokenizer

import plrhf
from plrhf.backbone.quantization import is_quantized
from plrhf.cli.assemble import build_run_trainer
from plrhf.cli.config import RunConfig
from plrhf.reporting.runs import role

KINDS: dict[str, list[str]] = {
    "vanilla": ["encoder=none"],
    "uniform": ["encoder=uniform", "model.pooling=last"],
    "lookup": ["encoder=lookup", "aggregator.site=every_block"],
    "cluster": ["encoder=cluster", "aggregator=soft_prompt", "aggregator.n_tokens=2"],
    "features": ["encoder=features", "data.kind=features", "model.alpha=1"],
    "frozen": ["backbone.trainable=frozen", "aggregator.layer_width=7"],
    "shuffled": ["data.shuffle_users=true", "logger=tensorboard", "backbone.trainable=full"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_reward_models(name: str, tmp_path: Path, cache_dir: Path) -> None:
    run_dir, again = tmp_path / "run", tmp_path / "again"
    launch("train", *TINY, f"cache_dir={cache_dir}", f"run_dir={run_dir}", *KINDS[name])
    launch("eval", f"run={run_dir}", f"out={again}")
    assert evaluation_of(again) == evaluation_of(run_dir)
    if name == "shuffled":
        check_tensorboard(run_dir)
        shutil.rmtree(run_dir / "tensorboard")
        assert (run_dir / "export/backbone/model.safetensors").is_file()
        (run_dir / "export/backbone").rename(tmp_path / "backbone")
    results = check_run(run_dir)
    assert results["test"]["seen"]["user"]["n_pairs"] == 5 * 4
    assert results["test"]["unseen"]["user"]["n_pairs"] == 2 * 4
    assert results["data"]["rows"] == {"train": 70, "val": 15, "test": 28}
    roles = {"vanilla": "vanilla", "uniform": "uniform", "shuffled": "shuffled"}
    assert role(results["config"]) == roles.get(name, "personal")
    assert results["cells"]["seen_user_unseen_prompt"] == results["test"]["seen"]
    assert results["cells"]["seen_user_seen_prompt"] is None
    assert results["probes"]["overlap"]["train_test"]["prompt"] == 0
    if name in ("vanilla", "uniform"):
        assert results["test"]["seen"]["user"] == results["test"]["seen"]["generic"]


def check_tensorboard(run_dir: Path) -> None:
    """TensorBoard has the curves, all settings of the run, and the test results."""
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    results = json.loads((run_dir / "results.json").read_text())
    for kind in ("seen", "unseen"):
        for context in ("user", "generic"):
            [logged] = events.Scalars(f"test/{kind}/{context}/accuracy_micro")
            estimate = results["test"][kind][context]["accuracy_micro"]
            assert logged.value == pytest.approx(estimate["value"], abs=1e-6)
            [low] = events.Scalars(f"test/{kind}/{context}/accuracy_micro/low")
            assert low.value == pytest.approx(estimate["ci95"][0], abs=1e-6)
    assert "val/loss" in events.Tags()["scalars"]
    assert not any(name.startswith("test/") for name in pd.read_csv(run_dir / "metrics.csv"))
    settings = yaml.safe_load((run_dir / "tensorboard/hparams.yaml").read_text())
    for part in ("data", "encoder", "trainer", "optim", "seed"):
        assert settings[part] == results["config"][part]
    columns = HParamsPluginData.FromString(
        events.PluginTagToContent("hparams")["_hparams_/experiment"]
    ).experiment.metric_infos
    assert "test/seen/user/accuracy_micro" in {one.name.tag for one in columns}


@pytest.mark.slow
def test_policy(policy_run: Path) -> None:
    check_run(policy_run, generations=True)
    texts = [json.loads(line) for line in (policy_run / "generations.jsonl").open()]
    assert len(texts) == 2 * 2
    assert {text["writer"] for text in texts} == {"policy"}
    assert len({text["user_id"] for text in texts}) == len({t["prompt_id"] for t in texts}) == 2


@pytest.mark.slow
def test_supervised_model_is_a_backbone_for_others(tmp_path: Path, cache_dir: Path) -> None:
    run_dir = tmp_path / "sft"
    before = set(cache_dir.glob("tiny_gptj-*"))
    launch("train", *TINY, "model=sft", "seed=9", f"cache_dir={cache_dir}", f"run_dir={run_dir}")
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"config.yaml", "metrics.csv", "checkpoints", "export"}
    AutoModelForCausalLM.from_pretrained(run_dir / "export")
    assert AutoTokenizer.from_pretrained(run_dir / "export").pad_token == "<|endoftext|>"
    assert len(set(cache_dir.glob("tiny_gptj-*")) - before) == 1
    on_top = [f"backbone.path={run_dir / 'export'}", f"run_dir={tmp_path / 'reward'}"]
    # The hidden size of hf backbones is their own, so the tiny shape is not looked at.
    launch("train", *TINY, *on_top)
    check_run(tmp_path / "reward")


@pytest.mark.slow
def test_the_patience_of_a_backbone_asks_for_no_val_pairs(tmp_path: Path) -> None:
    """What a run itself sets does, as of every model."""

    def stoppers(*overrides: str, has_val: bool) -> list[Any]:
        config = RunConfig.from_settings(composed("model=sft", *overrides))
        callbacks: list[Any] = build_run_trainer(config, tmp_path, has_val=has_val).callbacks  # type: ignore[attr-defined]
        return [one for one in callbacks if isinstance(one, EarlyStopping)]

    (stopper,) = stoppers(has_val=True)
    assert stopper.patience == 10
    assert stoppers(has_val=False) == []
    with pytest.raises(ValueError, match=r"trainer\.patience=3 is not allowed: expected null"):
        stoppers("trainer.patience=3", has_val=False)


ROWS = ["data=jsonl", "data.batch_size=16", "trainer.max_epochs=1", "optim.warmup_steps=2"]


def hf(path: Path) -> list[str]:
    return [
        "backbone=hf",
        f"backbone.path={path}",
        "data.max_tokens=99",
        "data.max_prompt_tokens=32",
    ]


@pytest.mark.slow
def test_a_policy_on_weights_of_four_bits(tmp_path: Path) -> None:
    run, rows = tmp_path / "run", write_rows(tmp_path / "rows.jsonl", rows_of_world())
    given = [*ROWS, *hf(save_model(tmp_path / "gptj")), f"data.path={rows}", f"run_dir={run}"]
    given += ["backbone.quantization=nf4", "model=dpo", "trainer.max_epochs=4"]
    given += ["optim.lr=1e-2", "optim.user_lr=1e-1", "trainer.log_every_n_steps=1"]
    launch("train", *given, "samples.users=1", "samples.prompts=1", "samples.max_new_tokens=3")
    check_run(run, oracle=False, generations=True)
    losses = pd.read_csv(run / "metrics.csv")["train/loss"].dropna()
    assert len(losses) == 20 and losses.iloc[-4:].mean() < 0.9 * losses.iloc[:4].mean()
    policy = plrhf.load(run / "export")
    layers = [one for one in policy.modules() if is_quantized(one)]
    assert len(layers) == 3 * 6
    [text] = policy.write([{"prompt": "Write.", "user_id": "ada-000"}], max_new_tokens=3)
    assert isinstance(text, str)


@pytest.mark.slow
def test_rows_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "gptj")
    rows = rows_of_world()
    rows.append({**rows[0], "pair_id": "new", "chosen": " "})
    plain = write_rows(tmp_path / "rows.jsonl", rows)
    zipped = tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    tables = []
    for path in (zipped, table):
        run_dir = tmp_path / f"run-{path.suffix}"
        launch("train", *ROWS, *hf(model), f"data.path={path}", f"run_dir={run_dir}")
        results = check_run(run_dir, oracle=False)
        assert results["data"]["refused"] == {"empty response": 1}
        said = capsys.readouterr().out
        assert f"refused: 1 of {len(rows)} records\n  1 empty response, first {path}:" in said
        tables.append(pd.read_parquet(run_dir / "predictions.parquet"))
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.slow
def test_pairs_on_seen_prompts_and_warnings_of_probes(tmp_path: Path, capsys: Any) -> None:
    model = save_model(tmp_path / "gptj")
    rows = rows_of_world(n_users=8, pairs_per_user=60, n_prompts=60)
    for row in rows:
        del row["split"]
        row["rejected"] = str([row["rejected"]])
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run_dir = tmp_path / "run"
    kept = ["data.seen_prompt_test_fraction=0.2", "data.unseen_fraction=0.3"]
    launch("train", *ROWS, *hf(model), *kept, f"data.path={path}", f"run_dir={run_dir}")
    results = check_run(run_dir, oracle=False)
    cells = results["cells"]
    assert all(cell["user"]["n_pairs"] > 0 for cell in cells.values())
    for kind in ("seen", "unseen"):
        sizes = [cells[f"{kind}_user_{p}_prompt"]["user"]["n_pairs"] for p in ("seen", "unseen")]
        assert sum(sizes) == results["test"][kind]["user"]["n_pairs"]
    predictions = pd.read_parquet(run_dir / "predictions.parquet")
    assert set(predictions["prompt_kind"][predictions["split"] == "val"]) == {"unseen"}
    assert results["probes"]["format_only"]["accuracy"]["value"] == 1
    (line,) = [one for one in results["probes"]["warnings"] if "format_only" in one]
    out = capsys.readouterr().out.splitlines()
    assert [one for one in out if "format_only" in one] == [f"warning: {line}"]
    assert not any("probe prompt" in one for one in out)


@pytest.mark.slow
def test_bidirectional_backbone(tmp_path: Path) -> None:
    model = save_model(tmp_path / "bert", "bert")
    path = write_rows(tmp_path / "rows.jsonl", rows_of_world())
    run_dir = tmp_path / "run"
    launch("train", *ROWS, *hf(model), f"data.path={path}", f"run_dir={run_dir}")
    check_run(run_dir, oracle=False)


OUTSIDER = '''
import torch
from plrhf.encoders import UserEncoder

class Ages(UserEncoder):
    """What an outsider may write: asks for what it needs, and has a setting of its own."""

    def __init__(self, *, user_dim: int, n_users: int, slope: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((n_users + 1, user_dim), slope))

    def forward(self, users):
        return self.weight[users.user_id]

    def generic(self, batch_size):
        return self.weight[:1].expand(batch_size, -1)

    def user_parameters(self):
        return [self.weight]
'''


@pytest.mark.slow
def test_an_outsiders_encoder_by_its_dotted_path(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outsider.py").write_text(OUTSIDER)
    monkeypatch.syspath_prepend(tmp_path)
    run_dir = tmp_path / "run"
    own = ["encoder=none", "encoder._target_=outsider.Ages", "+encoder.slope=2"]
    launch("train", *TINY, f"cache_dir={cache_dir}", f"run_dir={run_dir}", *own)
    check_run(run_dir)
    with pytest.raises(SystemExit):  # reading a run imports nothing from outside by itself
        launch("eval", f"run={run_dir}")
    launch("eval", f"run={run_dir}", "trust_components=true")
    assert evaluation_of(run_dir / "eval") == evaluation_of(run_dir)


@pytest.mark.slow
def test_a_sweep_gives_each_job_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[tuple[str, int, int], str] = {}

    def train(settings: Any) -> None:
        name, seeds = settings["encoder"]["name"], (settings["seed"], settings["data"]["seed"])
        found[name, *seeds] = settings["run_dir"]

    monkeypatch.setattr("plrhf.cli.run.train", train)
    common = ["data.n_users=7", f"run_dir={tmp_path / 'sweep'}"]
    launch("train", "-m", "encoder=none,lookup", "seed=0,1", *common)
    assert set(found) == {(name, seed, seed) for name in ("none", "lookup") for seed in (0, 1)}
    for (name, seed, _), folder in found.items():
        assert folder == str(tmp_path / f"sweep/encoder={name},seed={seed}")


@pytest.mark.slow
def test_a_tiny_backbone_is_trained_once(tmp_path: Path, capsys: Any) -> None:
    cache = tmp_path / "cache"
    places = [f"cache_dir={cache}", f"run_dir={tmp_path / 'run'}", "overwrite=true"]

    def backbones(*overrides: str) -> int:
        launch("train", *TINY, *places, *overrides)
        return len(list(cache.glob("tiny_gptj-*")))

    assert backbones() == 1
    assert "training the backbone first (at most 5 steps)" in capsys.readouterr().out
    # Neither who chose nor the model on top is anything to the backbone.
    assert backbones("encoder=none", "data.shuffle_users=true", "optim.user_lr=1", "seed=0") == 1
    assert "training the backbone first" not in capsys.readouterr().out


# train.py that begins to train its backbone when another process has come as far.
AT_ONCE = """
import os, time
from pathlib import Path
from plrhf.cli import commands, main

def at_once(*given):
    ready = Path(__file__).parent / "ready"
    ready.mkdir(exist_ok=True)
    (ready / str(os.getpid())).touch()
    while len(list(ready.iterdir())) < 2:
        time.sleep(0.05)
    train_supervised(*given)

def run_task(*given):
    global train_supervised
    from plrhf.cli import supervised
    train_supervised, supervised.train_supervised = supervised.train_supervised, at_once
    return run_task_alone(*given)

run_task_alone, main.run_task = main.run_task, run_task
commands.train()
"""


@pytest.mark.long
def test_two_processes_may_train_the_same_backbone(tmp_path: Path) -> None:
    script = tmp_path / "at_once.py"
    script.write_text(AT_ONCE)
    settings = [*TINY, f"cache_dir={tmp_path / 'cache'}"]
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), *settings, f"run_dir={tmp_path / n}"],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in ("one", "two")
    ]
    for run in runs:
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
        assert err == ""
        assert "training the backbone first" in out
        assert "report:" in out
        for noise in ("GPU", "Tip", "weights_only", "Warning", "val_check_interval"):
            assert noise not in out
    assert len(list((tmp_path / "cache").glob("tiny_gptj-*"))) == 1
    tables = [(tmp_path / n / "predictions.parquet").read_bytes() for n in ("one", "two")]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_policy_learns_from_a_reward_model(
    reward_run: Path, tmp_path: Path, cache_dir: Path, capsys: Any
) -> None:
    own = ["model=grpo", f"model.reward={reward_run}", "model.group_size=2", "data.batch_size=4"]
    own += ["model.max_new_tokens=4", "trainer.max_steps=2", "trainer.max_epochs=null"]
    own += ["trainer.val_every_n_steps=2", f"cache_dir={cache_dir}"]
    own += ["trainer.monitor=val/true_preference", "trainer.patience=1"]
    run_dir = tmp_path / "run"
    launch("train", *TINY, *own, f"run_dir={run_dir}")
    check_run(run_dir, generations=True)
    metrics = pd.read_csv(run_dir / "metrics.csv")
    judged = ["val/reward", "val/kl", "val/length", "val/true_preference"]
    assert metrics[judged].notna().all(axis=1).sum() == 1
    [text] = plrhf.load(run_dir).write([{"prompt": "Write a note."}], max_new_tokens=3)
    assert isinstance(text, str)
    for wrong, said in (
        (["seed=1"], "the same world"),
        (["seed=1", f"model.reward={reward_run / 'export'}"], "the same world"),
        (["model.reward=null"], "model.reward=None"),
    ):
        with pytest.raises(SystemExit):
            launch("train", *TINY, *own, f"run_dir={tmp_path / 'wrong'}", *wrong)
        assert said in capsys.readouterr().err
