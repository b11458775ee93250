"""Runs small enough to take seconds, through the real entry points; and what a run must leave."""

from __future__ import annotations

import copy
import json
import os
import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny import language_model
from transformers import PreTrainedTokenizerBase

from plrhf.backbone.tiny import train_tokenizer
from plrhf.cli.main import CONF
from plrhf.data.sources.personas import PersonasSource

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

WORLD = {"n_users": 5, "n_unseen_users": 2, "pairs_per_user": 14, "n_prompts": 20}
TINY = [
    *(f"data.{name}={value}" for name, value in WORLD.items()),
    *("data.val_pairs_per_user=3", "data.test_pairs_per_user=4", "data.batch_size=16"),
    *("backbone.tiny.width=32", "backbone.tiny.n_layers=2", "backbone.tiny.vocab_size=700"),
    *("backbone.sft.max_steps=5", "trainer.max_epochs=1", "optim.warmup_steps=2"),
    *("samples.users=2", "samples.prompts=2", "samples.max_new_tokens=4"),
]

COLUMNS = {
    "split": "str",
    "user_kind": "str",
    "prompt_kind": "str",
    "context": "str",
    "user_id": "str",
    "pair_id": "str",
    "prompt_id": "str",
    "margin": "float64",
    "correct": "float64",
    "chosen_tokens": "int64",
    "rejected_tokens": "int64",
}
ACCURACIES = {"accuracy_micro", "accuracy_macro", "accuracy_worst10"}


def composed(*overrides: str, config: str = "train") -> dict[str, Any]:
    """The settings that a command line gives, as a plain dict of one's own."""
    return copy.deepcopy(_composed(overrides, config))


@cache
def _composed(overrides: tuple[str, ...], config: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose(config, overrides=list(overrides))
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def launch(entry: str, *overrides: str) -> None:
    """Run train.py or eval.py as a command line would, in this process."""
    with patch.object(sys, "argv", [f"{entry}.py", *overrides]):
        runpy.run_path(str(ROOT / f"{entry}.py"), run_name="__main__")


def command(entry: str, *overrides: str) -> list[str]:
    """The same for a process of its own."""
    return [sys.executable, str(ROOT / f"{entry}.py"), *overrides]


def world(**settings: Any) -> PersonasSource:
    return PersonasSource(kind="individual", **{**WORLD, **settings})


def world_tokenizer() -> PreTrainedTokenizerBase:
    """One that knows the world's words, and so needs few tokens."""
    fields = ("prompt", "chosen", "rejected")
    texts = [str(row[name]) for _, row in world().records() for name in fields]
    return train_tokenizer(texts, vocab_size=700)


def save_model(directory: Path, kind: str = "gptj", *, pad_token: bool = True) -> Path:
    """A random model of `tiny.language_model` with a tokenizer, as save_pretrained leaves them."""
    tokenizer = world_tokenizer()
    language_model(kind, vocabulary=len(tokenizer)).save_pretrained(directory)
    if kind == "bert":
        tokenizer.add_special_tokens({"sep_token": "<|endoftext|>", "cls_token": "<|endoftext|>"})
        tokenizer.eos_token = tokenizer.bos_token = None
    if not pad_token:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(directory)
    return directory


def rows_of_world(*, features: bool = False, **settings: Any) -> list[dict[str, Any]]:
    """The world's rows as a file of rows would hold them."""
    fields = ("prompt", "chosen", "rejected", "user_id", "prompt_id", "pair_id", "split")
    rows = [{name: row[name] for name in fields} for _, row in world(**settings).records()]
    if features:
        for number, row in enumerate(rows):
            row["user_features"] = {"age": 20 + len(row["user_id"]) + number % 1, "sea": "north"}
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows of data; or records that were read from a run and altered, without their digests."""
    plain = [{name: value for name, value in row.items() if name != "digest"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in plain))
    return path


def evaluation_of(directory: Path) -> dict[str, Any]:
    """results.json without the command that evaluated the run, its digest, and that of its training."""
    results = json.loads((directory / "results.json").read_text())
    del results["provenance"]["command"], results["digest"]
    results["provenance"]["files"].pop("metrics.csv", None)  # which training alone leaves
    return dict(results)


def check_run(
    run_dir: Path, *, oracle: bool = True, generations: bool = False, in_sweep: bool = False
) -> dict[str, Any]:
    """Assert the run directory's contract, and return results.json."""
    names = {"config.yaml", "metrics.csv", "checkpoints", "predictions.parquet", "results.json"}
    names |= {"report.html", "export"} | ({"generations.jsonl"} if generations else set())
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    alike = ("plrhf.encoders.NoneEncoder", "plrhf.encoders.UniformEncoder")
    personal = settings["encoder"]["_target_"] not in alike
    names |= {"users.json"} if personal else set()
    names |= {"log.txt"} if in_sweep else set()
    assert {path.name for path in run_dir.iterdir()} == names
    assert "${" not in (run_dir / "config.yaml").read_text()
    assert "last.ckpt" in {path.name for path in (run_dir / "checkpoints").iterdir()}
    suffixes = {path.suffix for path in (run_dir / "export").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".md"}  # the third: a chat template
    assert {"epoch", "step", "val/loss"} <= set(pd.read_csv(run_dir / "metrics.csv").columns)
    results = check_evaluation(run_dir, oracle=oracle)
    assert results["config"] == settings
    return results


def check_evaluation(directory: Path, *, oracle: bool = True) -> dict[str, Any]:
    """Assert what predictions.parquet and results.json hold, and that the two agree."""
    predictions = pd.read_parquet(directory / "predictions.parquet")
    assert {name: str(kind) for name, kind in predictions.dtypes.items()} == COLUMNS
    assert not predictions.isna().any().any()
    assert set(predictions["split"]) <= {"val", "test"}
    assert set(predictions["user_kind"]) <= {"seen", "unseen"}
    contexts = {"user", "generic", *(["oracle"] if oracle else [])}
    assert set(predictions["context"]) == contexts
    assert set(predictions["correct"]) <= {0.0, 0.5, 1.0}
    assert not predictions.duplicated(["pair_id", "context"]).any()

    results = json.loads((directory / "results.json").read_text())
    keys = {"schema", "config", "test", "cells", "oracle", "controls", "data", "probes", "run"}
    assert set(results) == {*keys, "privacy", "provenance", "digest"} and results["schema"] == 1
    assert set(results["run"]) == {"command", "versions"}
    counts = {"read", "refused", "dropped", "truncated", "rows", "users", "padding"}
    assert set(results["data"]) == counts
    assert set(results["test"]) == {"seen", "unseen"}
    assert (results["oracle"] is not None) == oracle
    for kind in ("seen", "unseen"):
        assert set(results["test"][kind]) == {"user", "generic"}
        for context in contexts:
            cell = results["oracle"] if context == "oracle" else results["test"]
            cell = cell[kind] if context == "oracle" else cell[kind][context]
            check_cell(cell, predictions, kind, context)
        control = results["controls"]["length_only"][kind]
        assert set(control) == {*ACCURACIES, "nll", "ece", "n_pairs", "n_users"}
        assert control["nll"]["value"] is control["ece"]["value"] is None
    return results


def check_cell(cell: dict[str, Any], predictions: pd.DataFrame, kind: str, context: str) -> None:
    """Assert that one M of results.json is what its rows of the table say."""
    rows = predictions[
        (predictions["split"] == "test")
        & (predictions["user_kind"] == kind)
        & (predictions["context"] == context)
    ]
    assert set(cell) == {*ACCURACIES, "nll", "ece", "n_pairs", "n_users"}
    assert cell["n_pairs"] == len(rows) and cell["n_users"] == rows["user_id"].nunique()
    for name in (*ACCURACIES, "nll", "ece"):
        value = cell[name]
        assert set(value) == {"value", "ci95"} and len(value["ci95"]) == 2
        assert (value["value"] is None) == (len(rows) == 0)
    if len(rows) > 0:
        correct = (rows["margin"] > 0) + 0.5 * (rows["margin"] == 0)
        assert cell["accuracy_micro"]["value"] == correct.mean()
        per_user = correct.groupby(rows["user_id"]).mean()
        assert abs(cell["accuracy_macro"]["value"] - per_user.mean()) < 1e-12
        low, high = cell["accuracy_micro"]["ci95"]
        assert low <= correct.mean() <= high
