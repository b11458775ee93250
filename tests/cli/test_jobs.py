"""Sweeps: a failing job costs no other, finished ones are not done again, and the end names failures."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import ENVIRONMENT, TINY, check_run, command, launch

from plrhf.cli.config import RunConfig
from plrhf.cli.jobs import best_value, is_finished, job_folder, refuse_processes, still_improving
from plrhf.cli.run import note_if_too_short
from plrhf.core.components import first_difference
from plrhf.core.errors import BadValue
from plrhf.models.optim import Optim

NO_RANK = (
    "encoder.rank=0 is not allowed: expected a whole number from 1 or null. Set encoder.rank=1."
)


def sweep(capsys: Any, *overrides: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a sweep in this process."""
    status = 0
    try:
        launch("train", "-m", *overrides)
    except SystemExit as stop:
        status = int(str(stop.code))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, cache_dir: Path, capsys: Any) -> None:
    there = tmp_path / "sweep"
    same = [*TINY, f"cache_dir={cache_dir}", f"run_dir={there}"]
    status, out, err = sweep(capsys, *same, "encoder.rank=0,2")
    assert status == 1
    assert out.count("done in ") == 1 and f"s: {there / 'encoder.rank=2'}: " in out
    assert f"failed: {there / 'encoder.rank=0'}: " in err
    assert err.endswith(
        "1 of the jobs failed; error.txt in its folder says more:\n"
        f"  {there / 'encoder.rank=0'}: {NO_RANK}\n"
    )
    assert (there / "encoder.rank=0/error.txt").read_text() == f"{NO_RANK}\n"
    results = check_run(there / "encoder.rank=2", in_sweep=True)
    # The job's own command, and what it had to say.
    assert "encoder.rank=2" in results["run"]["command"] and "-m" not in results["run"]["command"]
    assert "user context" in (there / "encoder.rank=2/log.txt").read_text()
    before = (there / "encoder.rank=2/results.json").stat().st_mtime_ns

    status, out, err = sweep(capsys, *same, "encoder.rank=1,2")
    assert (status, err) == (0, "")
    check_run(there / "encoder.rank=1", in_sweep=True)
    assert (there / "encoder.rank=2/log.txt").read_text().endswith("\nfinished before\n")
    assert (there / "encoder.rank=2/results.json").stat().st_mtime_ns == before

    # Another sweep with the same folders would overwrite what took long.
    status, _, err = sweep(capsys, *same, "optim.lr=0.1", "encoder.rank=1,2")
    assert status == 1
    allowed = "expected a directory of its own, as it holds a run of optim.lr=5e-05. "
    assert f"{allowed}Set run_dir to another, or overwrite=true." in err
    assert (there / "encoder.rank=2/results.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_what_is_no_slip_of_the_user_keeps_its_traceback(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(settings: Any) -> None:
        if settings["seed"] == 1:
            raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("plrhf.cli.run.train", broken)
    status, out, err = sweep(capsys, "seed=0,1,2", f"run_dir={tmp_path}")
    assert status == 1 and out.count("done in ") == 2
    assert err.endswith(f"  {tmp_path / 'seed=1'}: RuntimeError: out of memory\n")
    kept = (tmp_path / "seed=1/error.txt").read_text()
    assert kept.startswith("RuntimeError: out of memory\nTraceback") and "in broken" in kept


@pytest.mark.slow
def test_a_sweep_leaves_errors_of_others_alone(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plrhf.cli.run.train", lambda settings: 0.25)
    kept = []
    for name in ("other/error.txt", "seed=7/error.txt", "seed=0/deeper/error.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("of somebody else\n")
        os.utime(path, (1, 1))
        kept.append(path)
    (tmp_path / "seed=0/error.txt").write_text("of the job that is done again\n")
    status, _, err = sweep(capsys, "seed=0,1", f"run_dir={tmp_path}")
    assert (status, err) == (0, "")
    assert all(path.read_text() == "of somebody else\n" for path in kept)
    assert not (tmp_path / "seed=0/error.txt").exists()


@pytest.mark.slow
def test_a_sweeper_gets_the_monitored_value(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []

    def returned(job: Any) -> Any:
        found.append(job.return_value)
        return job.return_value

    def train(settings: Any) -> float:
        if settings["seed"] == 1:
            raise RuntimeError("no memory")
        return 0.25

    monkeypatch.setattr("plrhf.cli.run.train", train)
    monkeypatch.setattr(
        "plrhf.cli.jobs.NameFailedJobs.on_job_end",
        lambda _, **job: returned(job["job_return"]),
        raising=False,
    )
    sweep(capsys, "seed=0,1", f"run_dir={tmp_path}")
    assert found[0] == 0.25 and math.isnan(found[1])


def test_the_best_value_of_a_run(tmp_path: Path) -> None:
    assert best_value(tmp_path, "val/loss") is None
    lines = ["step,train/loss,val/accuracy_micro,val/loss", "0,0.1,,", "1,,0.5,0.7", "2,,0.4,0.6"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    assert best_value(tmp_path, "val/loss") == 0.6
    assert best_value(tmp_path, "val/accuracy_micro") == 0.5
    assert best_value(tmp_path, "val/nll") is None


def test_a_best_value_at_the_very_end_is_said(tmp_path: Path) -> None:
    def note(*values: float) -> str | None:
        lines = ["step,val/loss", *(f"{step},{one}" for step, one in enumerate(values))]
        (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
        return still_improving(tmp_path, "val/loss")

    assert still_improving(tmp_path, "val/loss") is None
    assert note(0.7) is None and note(0.6, 0.7) is None and note(0.6, 0.6) is None
    assert note(0.7, 0.65, 0.6) == (
        "val/loss was best at the last of 3 validations (0.6500, then 0.6000): a longer training may "
        "do better (trainer.max_epochs, trainer.max_steps)"
    )


def test_a_training_that_is_all_warm_up_says_so(tmp_path: Path, capsys: Any) -> None:
    trainer = SimpleNamespace(monitor="val/loss")
    config = RunConfig.model_construct(run_dir=str(tmp_path), trainer=trainer, optim=Optim())
    note_if_too_short(config, 15, 999)
    assert capsys.readouterr().out == (
        "note: all 15 steps were warm-up, in which learning rates only rise: train for longer, or set "
        "optim.warmup_steps=1 (now 150)\n"
    )
    note_if_too_short(config, 151, 999)
    note_if_too_short(config, 15, 15)  # one of which was warm-up
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_bad_choice_stops_a_sweep_before_it_begins(tmp_path: Path, capsys: Any) -> None:
    status, out, err = sweep(capsys, "encoder=lookup,lockup", f"run_dir={tmp_path}")
    assert status == 2 and err.startswith("error: encoder='lockup' is not allowed")
    assert not any(path.is_dir() for path in tmp_path.iterdir())


@pytest.mark.slow
def test_ctrl_c_stops_the_whole_sweep(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("plrhf.cli.run.train", stopped)
    status, _, _ = sweep(capsys, "seed=0,1", f"run_dir={tmp_path}")
    assert status == 130
    assert (tmp_path / "seed=0").exists() and not (tmp_path / "seed=1").exists()


def test_finished_is_finished_with_the_same_settings(tmp_path: Path) -> None:
    settings = {"run_dir": str(tmp_path), "seed": 1, "data": {"n": 3}, "logger": {"name": "csv"}}
    assert not is_finished(settings)
    (tmp_path / "results.json").write_text(json.dumps({"config": {**settings, "run_dir": "then"}}))
    assert not is_finished(settings)  # killed before its report
    (tmp_path / "report.html").touch()
    assert is_finished({**settings, "logger": {"name": "wandb"}, "cache_dir": "elsewhere"})
    with pytest.raises(ValueError, match=r"as it holds a run of data\.n=3\. Set run_dir to"):
        is_finished({**settings, "data": {"n": 4}})
    (tmp_path / "results.json").write_text('{"config": {')
    with pytest.raises(BadValue, match=r"^.*/results\.json='.*' is not allowed: expected JSON"):
        is_finished(settings)


def test_first_difference_by_dotted_name() -> None:
    one = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert first_difference(one, {"a": {"b": 1, "c": [1, 2]}}) is None
    assert first_difference(one, {"a": {"b": 1, "c": [2]}}) == ("a.c", [1, 2], [2])
    assert first_difference(one, {"a": {"b": 1, "c": [1, 2]}, "e": 5}) == ("e", None, 5)
    assert first_difference({"a": 1}, {"a": {"b": 1}}) == ("a", 1, {"b": 1})


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_with_processes_of_their_own(launcher: str, tmp_path: Path) -> None:
    refused = "trainer.devices=2"  # which a job finds before it loads what trains
    jobs = ["-m", f"hydra/launcher={launcher}", refused, "seed=0,1", "run_dir=sweep"]
    done = subprocess.run(
        command("train", *jobs),
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 1, done.stderr
    line = f"{refused} is not allowed: expected 1 in a sweep. Start each run by itself."
    assert done.stderr.endswith("".join(f"  sweep/seed={n}: {line}\n" for n in (0, 1)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"devices": 2}, "trainer.devices=2 is not allowed: expected 1 in a sweep. "),
        ({"num_nodes": 3}, "trainer.num_nodes=3 is not allowed: expected 1 in a sweep. "),
        ({"zero3": {}}, "trainer.zero3={} is not allowed: expected null in a sweep. "),
    ],
)
def test_a_job_of_a_sweep_starts_no_processes(changed: dict[str, Any], message: str) -> None:
    alone = {"devices": 1, "num_nodes": 1, "zero3": None}
    refuse_processes({"trainer": alone})
    refuse_processes({})  # eval.py has no trainer
    with pytest.raises(BadValue) as error:
        refuse_processes({"trainer": {**alone, **changed}})
    assert str(error.value) == f"{message}Start each run by itself."


def test_a_folder_says_what_differs_and_is_a_file_name() -> None:
    assert job_folder("encoder=lookup,seed=1", 0) == "encoder=lookup,seed=1"
    assert job_folder("", 7) == "7" and job_folder("..", 7) == "7"
    one, two = (job_folder(f"backbone.path=models/{name}", 0) for name in ("a b", "a/b"))
    assert one.startswith("backbone.path=models_a_b-") and one != two and "/" not in two
    long = {job_folder("x" * 300 + end, 0) for end in "ab"}
    assert len(long) == 2 and max(map(len, long)) <= 150
