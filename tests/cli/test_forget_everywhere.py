"""After forgetting, a search over all bytes of run, export and cache finds nothing of the person."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from runs import composed
from safetensors.torch import load_file

from plrhf.cli.forget import forget
from plrhf.evaluation.records import read_settings, write_settings
from plrhf.models.card import read_card

HERS = "A text that was written for one person alone."


def traces(folder: Path, wanted: list[bytes]) -> dict[str, list[bytes]]:
    """The files of a folder whose bytes, or whose cells if they are tables, hold one of these."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content += pd.read_parquet(path).to_csv().encode()
        here = [one for one in wanted if one in content]
        if len(here) > 0:
            found[str(path.relative_to(folder))] = here
    return found


def leave_everything(run: Path, user: str, generations: list[dict[str, Any]]) -> None:
    """Put beside a run's files what sweeps, loggers, later evaluations and kills leave there."""
    best = [{**one, "writer": "best_of_policy", "response": HERS} for one in generations]
    later = run / "eval/later"
    later.mkdir(parents=True)
    for name in ("predictions.parquet", "results.json"):
        shutil.copy(run / name, later / name)
    (later / "generations.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in best))
    (run / "log.txt").write_text(f"epoch 1\nwarning: {user!r} has one pair\n")
    for name in ("wandb/run-1/files/report.html", "mlruns/0/artifacts/report.html"):
        (run / name).parent.mkdir(parents=True)
        shutil.copy(run / "report.html", run / name)
    (run / "tensorboard").mkdir(exist_ok=True)
    (run / "tensorboard/hparams.yaml").write_text(f"samples:\n  users: [{user}]\n")
    shutil.copytree(run / "export", run / "export.part")
    (run / "generations.jsonl.part").write_text(json.dumps(best[0])[:-9])
    shutil.copy(run / "predictions.parquet", run / "predictions.parquet.part")
    settings = read_settings(run / "config.yaml")
    settings["samples"]["users"] = [user]
    write_settings(run / "config.yaml", settings)


@pytest.mark.slow
def test_no_byte_of_a_person_stays_in_any_kind_of_file(
    policy_run: Path, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(policy_run, run)
    shutil.copytree(cache_dir, cache)
    lines = (run / "generations.jsonl").read_text().splitlines()
    user = next(one for one in read_card(run / "export").users if f'"{one}"' in "".join(lines))
    own = [json.loads(line) for line in lines if f'"user_id": "{user}"' in line]
    leave_everything(run, user, own)
    place = read_card(run / "export").places[user]
    tables = load_file(run / "export/user_encoder.safetensors")
    vector = tables["encoder.weights.weight"][place].numpy().tobytes()
    wanted = [user.encode(), vector, HERS.encode()]
    before = traces(run, wanted)
    assert {"users.json", "log.txt", "eval/later/generations.jsonl", "config.yaml"} <= before.keys()
    assert HERS.encode() in before["generations.jsonl.part"]
    assert vector in before["export/user_encoder.safetensors"]
    assert any(vector in here for name, here in before.items() if name.endswith(".ckpt"))
    forget(composed(f"run={run}", f"user={user}", f"cache_dir={cache}", config="forget"))
    assert "WARNING" not in capsys.readouterr().out
    assert traces(tmp_path, wanted) == {}
    assert (run / "log.txt").read_text() == "epoch 1\n"
    left = {path.name for path in run.iterdir()}
    assert not left & {"wandb", "mlruns", "tensorboard", "export.part", "generations.jsonl.part"}
