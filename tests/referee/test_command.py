"""docs/new_method.md as its reader would follow it: one file, one YAML, two commands."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
from runs import ROOT, rows_of_world, save_model, write_rows

from plrhf.cli.main import main

BLOCK = re.compile(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", re.DOTALL)
TASKS = {"eval": "plrhf.cli.tasks.evaluate", "train": "plrhf.cli.run.train"}
LITTLE = ["eval.trials=2", "eval.shots=[0,1]", "eval.draws=1"]


@pytest.mark.long
def test_a_method_of_ones_own_goes_through_the_referee_and_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "new_method.md").read_text()
    n_lines = 0
    for name, text in BLOCK.findall(page):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        n_lines += len(text.splitlines())
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".py", ".yaml"} and n_lines < 60
    rows = rows_of_world(n_users=8)
    for row in rows:
        del row["split"]
    write_rows(tmp_path / "rows.jsonl", rows)
    save_model(tmp_path / "DIR")
    referee, train = re.findall(r"^PYTHONPATH=\. python (.*)$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(line: str, *more: str) -> str:
        words = [*shlex.split(line), "data.max_tokens=120", "data.batch_size=32", *more]
        monkeypatch.setattr(sys, "argv", words)
        entry = words[0].removesuffix(".py")
        main(entry, TASKS[entry])
        return capsys.readouterr().out

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.glob("jobs/*/*/*/*")}

    out = tmp_path / "runs" / "mine"
    assert "consistency" in run(referee, *LITTLE, "eval.jobs=2")
    table = pd.read_csv(out / "referee.csv")
    assert set(table["method"]) == {"vanilla", "own_length", "consistency"}
    assert list(table.columns) == [
        *("rows", "method", "halvings", "seed", "users", "shots", "measure", "value", "low", "high")
    ]
    assert set(table["measure"]) >= {"accuracy_micro", "accuracy_worst10", "nll", "ece"}
    assert set(table[table["users"] == "unseen"]["shots"]) == {0.0, 1.0}
    assert "# rows" in (out / "referee.md").read_text()
    assert "<script" not in (out / "report.html").read_text()
    before = written()
    assert len(before) == 2 * 3
    (out / "jobs/rows/consistency/0/job.json").unlink()  # as if killed there
    assert "report: " in run(referee, *LITTLE)
    after = written()
    assert {path.parts[-3] for path in before if after[path] != before[path]} == {"consistency"}
    run(train, "trainer.max_steps=2", "trainer.val_every_n_steps=1", "run_dir=run")
    assert (tmp_path / "run" / "results.json").is_file()
    monkeypatch.delitem(sys.modules, "consistency")
