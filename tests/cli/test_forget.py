"""A person is forgotten: no file of the run, its export or its cache holds what was theirs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from runs import composed

import plrhf
from plrhf.cli.forget import files_with, forget
from plrhf.cli.tasks import find_contests
from plrhf.evaluation.judges import JudgedRun, PreferenceJudge, win_rates
from plrhf.evaluation.records import read_record, write_record
from plrhf.evaluation.results import read_results
from plrhf.models.card import read_card


def copy_of(run: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    return copy


def told(run: Path, user: str, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    forget(composed(f"run={run}", f"user={user}", *more, config="forget"))
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_nothing_of_a_person_stays(
    policy_run: Path, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(policy_run, tmp_path)
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    before = read_card(run / "export")
    others = pd.read_parquet(run / "predictions.parquet")
    lines = (run / "generations.jsonl").read_text().splitlines()
    user = next(one for one in before.users if any(f'"{one}"' in line for line in lines))
    won = win_rates(contests := find_contests(run, str(run)), PreferenceJudge().compare(contests))
    judged = {"run": "", "against": "", "judge": {}}
    write_record(run / "winrate.json", JudgedRun(**won.model_dump(), **judged))  # type: ignore[arg-type]
    wanted = {"users.json", "generations.jsonl", "winrate.json"}
    assert {path.name for path in files_with(run, user)} >= wanted
    n_tokens = len(list(cache.glob("tokens-*")))
    receipt = told(run, user, capsys, f"cache_dir={cache}")
    assert "removed: id and vector in export/" in receipt
    assert any(one.startswith("removed: tokens of all ") for one in receipt)
    assert sum(one.startswith("cannot be removed: ") for one in receipt) == 3
    assert not any(one.startswith("WARNING") for one in receipt)
    assert files_with(run, user) == [] and not list(run.rglob("*.ckpt"))
    assert len(list(cache.glob("tokens-*"))) == n_tokens - 1
    after = pd.read_parquet(run / "predictions.parquet")
    assert after.equals(others[others["user_id"] != user].reset_index(drop=True))
    kept = [line for line in lines if f'"user_id": "{user}"' not in line]
    assert (run / "generations.jsonl").read_text().splitlines() == kept and len(kept) < len(lines)
    assert read_card(run / "export").users == [one for one in before.users if one != user]
    assert read_results(run).fingerprint == read_results(policy_run).fingerprint
    assert read_record(run / "winrate.json", JudgedRun).per_user.keys() == won.per_user.keys() - {
        user
    }
    model = plrhf.load(run)
    assert len(model.write([{"prompt": "Write a note."}], max_new_tokens=2, temperature=0.0)) == 1
    with pytest.raises(ValueError, match=f"^user='{user}' .* a user of"):
        told(run, user, capsys)


@pytest.mark.slow
def test_what_the_cache_keeps_is_said(
    reward_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(reward_run, tmp_path)
    user = read_card(run / "export").users[0]
    assert any(one.startswith("not looked at: caches") for one in told(run, user, capsys))
    with pytest.raises(ValueError, match="^run=.* a run with an export"):
        told(tmp_path, user, capsys)


@pytest.mark.slow
def test_ids_that_are_also_words_of_the_files(
    reward_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person may be called like a key or a value of a JSON file."""
    run = copy_of(reward_run, tmp_path)
    before = (run / "results.json").read_text()
    for name in ("seed", "micro", "lookup", "test"):
        with pytest.raises(ValueError, match="^user="):
            forget(composed(f"run={run}", f"user={name}", config="forget"))
        capsys.readouterr()
        assert (run / "results.json").read_text() == before and len(list(run.rglob("*.ckpt"))) > 0


@pytest.mark.slow
def test_a_damaged_file_is_named(policy_run: Path, tmp_path: Path) -> None:
    run = copy_of(policy_run, tmp_path)
    user = read_card(run / "export").users[0]
    for damaged in (
        b'{"a": ',
        (run / "users.json").read_bytes().replace(b'"users": [', b'"users": [1,', 1),
    ):
        (run / "users.json").write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"users\.json.* Remove users\.json, which may hold the"
        ):
            forget(composed(f"run={run}", f"user={user}", config="forget"))
