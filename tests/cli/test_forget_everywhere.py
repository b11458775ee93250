"""After forgetting, a search over all bytes of run, export and cache finds nothing of the person."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from runs import TINY, composed, launch, rows_of_world, write_rows
from safetensors.torch import load_file

from plrhf.backbone.loading import load_tokenizer
from plrhf.cli.config import RunConfig
from plrhf.cli.forget import forget
from plrhf.cli.rows import build_data
from plrhf.data.cache_files import CachedArrays
from plrhf.data.in_context import row_tokenizer
from plrhf.data.text_value_cache import text_keys
from plrhf.evaluation.chat_endpoint import Reply, ReplyStore
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
    write_rows(later / "generations.jsonl", best)
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


def keys_of_texts(run: Path) -> dict[str, set[bytes]]:
    """By user, the keys of the texts of their rows, as a cache of values has them."""
    data = build_data(RunConfig.of_run(run).data)
    tokenizer = row_tokenizer(load_tokenizer(str(run / "export")), read_card(run / "export").text)
    found: dict[str, set[bytes]] = {}
    for row in data.rows:
        pair = tokenizer.pair(row)
        both = text_keys([(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)])
        found.setdefault(row.user_id, set()).update(key.tobytes() for key in both)
    return found


def keys_of_values(cache: Path) -> set[bytes]:
    """The keys of all values of texts that a cache holds."""
    files = [CachedArrays(path)["keys"][:] for path in cache.glob("texts-*/values-*")]
    return {key.tobytes() for keys in files for key in keys}


def leave_replies(path: Path, user: str) -> None:
    """Put replies about a person and about others into a file, also one that a kill cut short."""
    store, counts = ReplyStore(path), {"refused": False, "input_tokens": 1, "output_tokens": 1}
    store.add("1", Reply(text=HERS, **counts), [user])  # type: ignore[arg-type]
    store.add("2", Reply(text="A, as I said.", **counts), ["another", user])  # type: ignore[arg-type]
    store.add("3", Reply(text="B", **counts), ["another"])  # type: ignore[arg-type]
    with path.open("a") as file:
        file.write(f'{{"key": "4", "text": "{HERS}')


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
    keys = keys_of_texts(run)
    hers = keys[user] - set().union(*(own for other, own in keys.items() if other != user))
    leave_replies(cache / "replies.jsonl", user)
    wanted = [user.encode(), vector, HERS.encode(), *hers]
    before = traces(run, wanted)
    values = keys_of_values(cache)
    assert len(hers) > 1 and hers & values
    assert {"users.json", "log.txt", "eval/later/generations.jsonl", "config.yaml"} <= before.keys()
    assert HERS.encode() in before["generations.jsonl.part"]
    assert vector in before["export/user_encoder.safetensors"]
    assert any(vector in here for name, here in before.items() if name.endswith(".ckpt"))
    forget(composed(f"run={run}", f"user={user}", f"cache_dir={cache}", config="forget"))
    assert "WARNING" not in capsys.readouterr().out
    assert traces(tmp_path, wanted) == {}
    assert keys_of_values(cache) == values - hers != set()
    assert [json.loads(one)["key"] for one in (cache / "replies.jsonl").open()] == ["3"]
    assert (run / "log.txt").read_text() == "epoch 1\n"
    left = {path.name for path in run.iterdir()}
    assert not left & {"wandb", "mlruns", "tensorboard", "export.part", "generations.jsonl.part"}


@pytest.mark.slow
def test_no_category_stays_that_only_one_person_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of_world(features=True, n_users=4, n_unseen_users=0)
    user, rare = rows[0]["user_id"], "Zyxwvut of Qarth"
    for row in rows:
        town = rare if row["user_id"] == user else "Rome"
        row["user_features"] = {**row["user_features"], "town": town}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run, cache = tmp_path / "left/run", tmp_path / "left/cache"
    small = [*(one for one in TINY if not one.startswith("data.")), "data.max_prompt_tokens=64"]
    small += [f"cache_dir={cache}", f"run_dir={run}", "trainer.max_steps=1", "encoder=features"]
    launch("train", *small, "data=jsonl", f"data.path={path}", "data.use_user_features=true")
    capsys.readouterr()
    forget(composed(f"run={run}", f"user={user}", f"cache_dir={cache}", config="forget"))
    assert "not removed" not in capsys.readouterr().out
    assert traces(tmp_path / "left", [user.encode(), rare.encode(), b"Zyxwvut", b"Qarth"]) == {}
    assert (
        rare in path.read_text()
    )  # which is the person's own to delete, or whoever collected them
