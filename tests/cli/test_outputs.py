"""What fails after an evaluation costs no other file, and is said in one line."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from runs import TINY, launch

import plrhf
from plrhf.cli.outputs import FilesMissing, Outputs, one_line
from plrhf.core.errors import bad_value
from plrhf.core.files import is_disk_full

OF_POLICY = ["model=dpo", "encoder=cluster", "aggregator=soft_prompt", "aggregator.n_tokens=2"]


def test_one_failure_costs_no_other_file(tmp_path: Path, capsys: Any) -> None:
    outputs = Outputs()
    with outputs.writing(tmp_path / "half.json"):
        (tmp_path / "half.json").write_text("[1,")
        raise RuntimeError("out of\nmemory")
    with outputs.writing(tmp_path / "export"):
        (tmp_path / "export").mkdir()
        (tmp_path / "export/part").touch()
        raise OSError(errno.ENOSPC, "No space left on device", "part")
    with outputs.writing(tmp_path / "whole.json"):
        (tmp_path / "whole.json").write_text("[]")
    with pytest.raises(FilesMissing, match=r"^half\.json, export could not be written"):
        outputs.check()
    assert [path.name for path in tmp_path.iterdir()] == ["whole.json"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: half.json was not written: RuntimeError: out of memory"
    assert lines[1].startswith("error: export was not written: the disk that part lies on is full")
    assert len(lines) == 2


def test_ctrl_c_is_no_failure_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Outputs().writing(tmp_path / "one"):
        raise KeyboardInterrupt
    Outputs().check()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_by_whatever_is_raised_for_it(error: Exception) -> None:
    def raised() -> None:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("unexpected pos 64 vs 0") from cause

    assert is_disk_full(error)
    with pytest.raises(RuntimeError) as outer:
        raised()
    assert is_disk_full(outer.value) and "is full: free space" in one_line(outer.value)
    assert not is_disk_full(RuntimeError("unexpected"))
    assert one_line(bad_value("a", 1, "b", "c")) == "a=1 is not allowed: expected b. c."


@pytest.fixture
def failing_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch_like_error()

    monkeypatch.setattr("plrhf.cli.run.write_generations", fail)
    monkeypatch.setattr("plrhf.cli.run.write_users", fail)


def torch_like_error() -> RuntimeError:
    return RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")


@pytest.mark.slow
def test_a_failure_while_texts_are_written_leaves_the_evaluation(
    failing_texts: None, tmp_path: Path, cache_dir: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        launch("train", *TINY, *OF_POLICY, f"cache_dir={cache_dir}", f"run_dir={run}")
    assert stop.value.code == 1
    said = capsys.readouterr()
    for name in ("users.json", "generations.jsonl"):
        assert f"error: {name} was not written: RuntimeError: CUDA out of memory. Tried" in said.err
    assert said.err.endswith(
        "error: users.json, generations.jsonl could not be written; all else is there\n"
    )
    assert "Traceback" not in said.err and f"report: {run / 'report.html'}" in said.out
    results = json.loads((run / "results.json").read_text())
    table = pd.read_parquet(run / "predictions.parquet")
    n_pairs = results["test"]["seen"]["user"]["n_pairs"]
    of_seen = (table["split"] == "test") & (table["user_kind"] == "seen")
    assert n_pairs == (of_seen & (table["context"] == "user")).sum() > 0
    assert (run / "export/plrhf.json").is_file()


@pytest.mark.slow
def test_a_note_that_cannot_be_written_leaves_the_export(
    tmp_path: Path, cache_dir: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch_like_error()

    no_gain = {"value": 0.0, "ci95": (-0.1, 0.1)}
    monkeypatch.setattr("plrhf.cli.run.personal_gain", lambda _: no_gain)
    monkeypatch.setattr("plrhf.cli.run.add_note", fail)
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        launch("train", *TINY, f"cache_dir={cache_dir}", f"run_dir={run}")
    assert stop.value.code == 1
    assert capsys.readouterr().err.endswith(
        "error: README.md could not be written; all else is there\n"
    )
    assert plrhf.load(str(run / "export")).card.users != []


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_line(
    tmp_path: Path, cache_dir: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "predictions.parquet")

    monkeypatch.setattr("plrhf.cli.run.write_evaluation", full)
    with pytest.raises(SystemExit) as stop:
        launch("train", *TINY, f"cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}")
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert err == (
        "error: the disk that predictions.parquet lies on is full: free space on it, or choose "
        "run_dir, cache_dir and TMPDIR on another\n"
    )
