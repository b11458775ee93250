"""What other loggers get of a run, shown by stand-ins for their services."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from plrhf.cli.assemble import run_name
from plrhf.cli.config import RunConfig
from plrhf.training.loggers import MetricsFile, log_files, log_results, log_settings

RESULTS = {"test/seen/user/nll": 0.5, "test/seen/user/nll/low": 0.4, "test/seen/user/nll/high": 0.6}


def test_settings_and_results_go_to_all_but_the_file(tmp_path: Path) -> None:
    file, other = MetricsFile(tmp_path / "metrics.csv"), MagicMock()
    log_settings([file, other], {"seed": 1})
    log_results([file, other], {"seed": 1}, RESULTS, 7)
    other.log_hyperparams.assert_called_once_with({"seed": 1})
    other.log_metrics.assert_called_once_with(RESULTS, 7)
    assert file.rows == []


def test_files_become_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, gone = tmp_path / "report.html", tmp_path / "results.json"
    report.write_text("seen")
    library: Any = ModuleType("wandb")
    library.Artifact = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", library)
    wandb, mlflow = MagicMock(spec=WandbLogger), MagicMock(spec=MLFlowLogger)
    wandb.version, wandb.experiment = "abc", MagicMock()
    mlflow.run_id, mlflow.experiment = "def", MagicMock()
    log_files([wandb, mlflow], [report, gone])
    library.Artifact.assert_called_once_with("results-abc", type="results")
    library.Artifact.return_value.add_file.assert_called_once_with(str(report))
    wandb.experiment.log_artifact.assert_called_once_with(library.Artifact.return_value)
    wandb.experiment.finish.assert_called_once_with()
    mlflow.experiment.log_artifact.assert_called_once_with("def", str(report))
    (table := tmp_path / "comparison.md").write_text("| run |")
    board = MagicMock(spec=TensorBoardLogger)
    board.experiment = MagicMock()
    log_files([board], [report, table])
    board.experiment.add_text.assert_called_once_with("comparison", "| run |")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["encoder=cluster", "run_dir=runs/x", "seed=1"], "encoder=cluster seed=1"),
        (["+data.x=2", "logger.wandb.project=p"], "+data.x=2"),
        (["data.path=/a/b.jsonl", "+data.x=[c/d]"], "data.path=b.jsonl +data.x=[c/d]"),
        ([f"optim.lr=0.{'1' * 99}", "seed=3"], "seed=3"),  # of what is too long, the end
        (["overwrite=true"], "film-2"),
    ],
)
def test_a_name_says_what_differs(
    monkeypatch: pytest.MonkeyPatch, given: list[str], name: str
) -> None:
    of_job = SimpleNamespace(overrides=SimpleNamespace(task=given))
    found = SimpleNamespace(initialized=lambda: True, get=lambda: of_job)
    monkeypatch.setattr("plrhf.cli.assemble.HydraConfig", found)
    assert run_name(RunConfig.model_construct(run_dir="runs/film-2")) == name
