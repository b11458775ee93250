"""Run directories: no run mixes with another, and none goes on over other rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, check_run, composed, launch, rows_of_world, save_model, write_rows

from plrhf.cli import supervised
from plrhf.cli.config import RunConfig
from plrhf.cli.rows import build_data
from plrhf.cli.run_dir import LEFT_BY_RUNS, files_of_run


def refused(capsys: Any, *overrides: str) -> str:
    with pytest.raises(SystemExit) as stop:
        launch("train", *overrides)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("left", ["users.json", "checkpoints", "adapt.json", "export"])
def test_whatever_a_run_left_makes_a_directory_used(left: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / left).mkdir()
    line = refused(capsys, *TINY, f"run_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}")
    assert f"as it holds {left} of another run. Set run_dir to another, overwrite=true" in line
    assert {path.name for path in tmp_path.iterdir()} == {left}


@pytest.mark.slow
def test_overwriting_removes_all_of_the_old_run_and_nothing_else(
    reward_run: Path, tmp_path: Path, cache_dir: Path
) -> None:
    run = Path(shutil.copytree(reward_run, tmp_path / "run"))
    for name in ("adapt.json", "adapt_seen.json", "generations.jsonl", "winrate.json"):
        (run / name).write_text("of the old model")
    for name in ("eval", "tensorboard", "wandb"):
        (run / name).mkdir()
        (run / name / "old").touch()
    (run / f"results.json.{32 * 'a'}.part").touch()
    shutil.copytree(run / "export", run / "export.old")  # of a kill between two renames
    (run / "error.txt").write_text("of a job that failed")
    (run / "notes.txt").write_text("mine")
    (run / "plots").mkdir()
    same = [*TINY, f"cache_dir={cache_dir}", f"run_dir={run}", "overwrite=true"]
    launch("train", *same, "encoder=none", "data.pairs_per_user=13")
    assert (run / "notes.txt").read_text() == "mine"
    (run / "notes.txt").unlink()
    (run / "plots").rmdir()
    results = check_run(run)  # none of the files of another encoder
    assert results["config"]["encoder"]["name"] == "none"


@pytest.mark.slow
def test_what_a_refused_run_would_overwrite_stays(
    reward_run: Path, tmp_path: Path, capsys: Any
) -> None:
    run = Path(shutil.copytree(reward_run, tmp_path / "run"))
    line = refused(capsys, *TINY, f"run_dir={run}", "overwrite=true", "encoder.rank=0")
    assert line.startswith("error: encoder.rank=0 is not allowed")
    assert {path.name for path in run.iterdir()} == {path.name for path in reward_run.iterdir()}


def test_the_list_names_all_that_finished_runs_left(reward_run: Path, policy_run: Path) -> None:
    for run in (reward_run, policy_run):
        left = {path.name for path in run.iterdir()}
        assert left <= set(LEFT_BY_RUNS)
        assert {path.name for path in files_of_run(run)} == left


@pytest.mark.slow
def test_no_run_goes_on_over_other_rows(tmp_path: Path, capsys: Any) -> None:
    model = save_model(tmp_path / "gptj")
    rows = rows_of_world()
    path = write_rows(tmp_path / "rows.jsonl", rows)
    same = ["data=jsonl", f"data.path={path}", "data.max_tokens=99", "data.max_prompt_tokens=32"]
    same += ["backbone=hf", f"backbone.path={model}", f"run_dir={tmp_path / 'run'}"]
    launch("train", *same, "trainer.max_steps=1")
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    for other in (turned, rows[:-1], rows[::-1]):
        write_rows(path, other)
        line = refused(capsys, *same, "trainer.max_steps=2", "ckpt=last")
        assert line.startswith("error: data='rows ") and "which the run began with" in line
        assert "Restore the file that it read" in line
    write_rows(path, rows)
    launch("train", *same, "trainer.max_steps=2", "ckpt=last")
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 2


@pytest.mark.slow
def test_a_tiny_backbone_is_kept_by_all_that_decides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder(*overrides: str) -> Path:
        config = RunConfig.from_settings(composed(*TINY, "model=sft", *overrides))
        return supervised.cache_folder(config, build_data(config.data))

    changes = ["data.batch_tokens=256", "data.batch_size=7", "data.seed=3", "seed=2"]
    changes += ["data.pairs_per_user=13", "data.val_pairs_per_user=2"]
    changes += ["data.max_tokens=99", "data.use_user_text=true", "data.n_users=4"]
    changes += ["backbone.tiny.n_layers=3", "backbone.sft.responses=chosen", "backbone.sft.lr=1e-4"]
    changes += ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=0.5"]
    changes += ["trainer.val_every_n_steps=2", "trainer.patience=4", "optim.weight_decay=0.1"]
    found = [folder(), folder("seed=1", "data.seed=0"), *(folder(change) for change in changes)]
    assert len(set(found)) == len(found)
    for change in ("optim.user_lr=1.0", "trainer.progress=false", "encoder=none", "run_dir=x"):
        assert folder(change) == found[0], change
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "COMPUTATION", supervised.COMPUTATION + 1)
        assert folder() not in found
    monkeypatch.setattr(supervised, "version", lambda name: "another" if name == "torch" else "1")
    assert folder() not in found
