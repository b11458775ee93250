"""Runs and exports that somebody forged: none runs code, none loads other weights, each is one line.

    FAULTS=full python -m pytest tests/faults/test_hostile.py -s

Digests are made anew for what was changed, as a forger would. Anything of theirs that runs leaves a file.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sizes import IS_FULL

import plrhf
from plrhf.cli.config import RunConfig
from plrhf.core.errors import BadValue
from plrhf.data.digests import folder_digests, json_text
from plrhf.evaluation.records import write_settings
from plrhf.evaluation.results import read_results, write_evaluation
from plrhf.models.export import README
from plrhf.reporting.comparison_page import compare
from plrhf.reporting.report import write_report

Change = Callable[[Path], object]
EVERY = 1 if IS_FULL else 6  # so many cases are left out for one that is tried
ASKED = [{"prompt": "Write about the sea.", "response": one} for one in ("It is blue.", "No.")]
RAN = "ran"
"""File that appears where forged code runs."""

TARGETS = (
    *("evil.Anything", "os.system", "builtins.eval", "evil", "plrhf.evil.Anything"),
    *("plrhf.models.export.shutil.rmtree", "plrhf.models.export.ModelCard", "", None, 7, ["a"]),
)
"""Values of ``_target_``: of others, of Python, reached through plrhf, and none at all."""


class Runs:
    """What runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ[RAN]}",)


def card_with(part: str | None = None, **values: Any) -> Change:
    """Change settings of the card, or of one of its parts."""

    def change(export: Path) -> None:
        card = json.loads((export / "plrhf.json").read_text())
        if part is None:
            card |= values
        else:
            card[part] = {**card[part], **values}
        (export / "plrhf.json").write_text(json_text(card))

    return change


def seal(export: Path) -> None:
    """Let the card have the digests of the files that are there."""
    card_with(files=folder_digests(export, without=[README, "plrhf.json"]))(export)


def tensor_with(file: str, of: Callable[[torch.Tensor], torch.Tensor | None]) -> Change:
    """Change the last tensor of a file; None removes it."""

    def change(export: Path) -> None:
        state = {name: one.clone() for name, one in load_file(export / file).items()}
        name = sorted(state)[-1]
        value = of(state.pop(name))
        if value is not None:
            state[name] = value.contiguous()
        save_file(state, export / file, metadata={"format": "pt"})

    return change


def another_tensor(export: Path) -> None:
    read = load_file(export / "user_encoder.safetensors")
    state = {
        name: one.clone() for name, one in read.items()
    }  # the file is mapped, and written anew
    save_file({**state, "other": torch.ones(3)}, export / "user_encoder.safetensors")


def bytes_in(file: str, content: bytes) -> Change:
    return lambda export: (export / file).write_bytes(content)


def pickle_in(file: str) -> Change:
    return lambda export: (export / file).write_bytes(pickle.dumps(Runs()))


def instead(file: str, make: Callable[[Path], object]) -> Change:
    """Remove a file and make something else at its place."""

    def change(export: Path) -> None:
        (export / file).unlink()
        make(export / file)

    return change


def forged_code(file: str, **maps: str) -> Change:
    """Let a config name code that lies beside it."""

    def change(export: Path) -> None:
        path = export / file
        config = json.loads(path.read_text())
        (path.parent / "evil.py").write_text((export / "../evil.py").read_text())
        path.write_text(json.dumps({**config, "auto_map": maps, "tokenizer_class": "Anything"}))

    return change


def pickled(file: str, *, without: str | None = None) -> Change:
    """Write a pickle that runs code, by itself or as torch writes it, in the place of another file."""

    def change(export: Path) -> None:
        if without is not None:
            (export / without).unlink()
        torch.save({"weight": Runs()}, export / file)

    return change


WEIGHTS = ("user_encoder.safetensors", "adapter_model.safetensors", "backbone/model.safetensors")
HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
WRONG_TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "nan": lambda one: torch.full_like(one, torch.nan),
    "inf": lambda one: torch.full_like(one, torch.inf),
    "int8": lambda one: one.to(torch.int8),
    "complex": lambda one: one.to(torch.complex64),
    "bool": lambda one: one > 0,
    "longer": lambda one: torch.cat([one, one]),
    "flat": lambda one: one.reshape(-1, 1, 1),
    "gone": lambda one: None,
}
CARDS: dict[str, Change] = {
    **{
        f"{part} {target}": card_with(part, _target_=target)
        for part in ("encoder", "aggregator", "model")
        for target in TARGETS
    },
    **{
        f"head {target}": card_with("model", head={"_target_": target, "x": 1})
        for target in TARGETS
    },
    "schema": card_with(schema=2),
    "a key more": card_with(evil=1),
    "a user twice": card_with(users=["a", "a"]),
    "fewer users": card_with(users=["a"]),
    "users no list": card_with(users={"a": 1}),
    "users no text": card_with(users=[1, 2]),
    "less than nobody enrolled": card_with(enrolled=-1),
    "more enrolled than users": card_with(enrolled=10**12),
    "vectors as wide as nothing": card_with(enrolled=1, user_dim=10**12),
    "texts without end": card_with(
        n_texts=10**15, aggregator={"_target_": "plrhf.aggregators.FiLM"}
    ),
    "rank without end": card_with("encoder", rank=10**12),
    "tables of another": card_with(user_tables=["../weight"], n_texts=-1),
    "features no schema": card_with(features={"numbers": {"a": 1}}),
    "text no settings": card_with(text={"evil": 1}),
    "tokens none": card_with("text", max_tokens=-5),
    "another model": card_with(fingerprint="0" * 32),
    "no precision": card_with(precision="__import__('os')"),
    "a backbone elsewhere": card_with("backbone", path="../../../etc"),
    "a backbone at a root": card_with("backbone", path="/etc", ships_backbone=False),
    "files elsewhere": card_with(files={"../../../../etc/passwd": "0" * 32}),
    "files at a root": card_with(files={"/etc/passwd": "0" * 32}),
    "deep": bytes_in("plrhf.json", b'{"schema": 1, "users": ' + b"[" * 100_000),
    "latin": bytes_in("plrhf.json", '{"schema": 1, "users": ["é"]}'.encode("latin-1")),
}
UNREAD = (
    *("texts without end", "tables of another", "tokens none", "no precision"),
    *("a backbone elsewhere", "backbone/model.safetensors complex"),
)
"""Cases of what scoring does not read: refused, or the rewards are the same.

The backbone that an export ships is used whatever path it names. Of complex numbers transformers takes the
real parts, which are compared with the fingerprint of the weights that were exported.
"""

HARMLESS: dict[str, Change] = {
    "trust": card_with("backbone", trust_remote_code=True),
    "README": bytes_in(README, b"\x1b[2J<script>"),
    "names of users": lambda export: renamed(
        export, ["../../x", "\x1b[2J", "=1+1", "a\nb", "\u202e"]
    ),
    "a long name": lambda export: renamed(export, ["x" * 10**5]),
    "a pickle beside": pickled("optimizer.pt"),
    "a pickle in the backbone": pickled("backbone/pytorch_model.bin"),
    "code of the backbone": forged_code(
        "backbone/config.json", AutoModelForCausalLM="evil.Anything"
    ),
}


def renamed(export: Path, names: list[str]) -> None:
    users = json.loads((export / "plrhf.json").read_text())["users"]
    card_with(users=[*names, *users[len(names) :]])(export)


FORGED: dict[str, Change] = {
    **CARDS,
    **{
        f"{file} {name}": tensor_with(file, of)
        for file in WEIGHTS
        for name, of in WRONG_TENSORS.items()
    },
    "a tensor more": another_tensor,
    "no backbone": lambda export: shutil.rmtree(export / "backbone"),
    **{
        f"{file} {name}": bytes_in(file, content)
        for file in WEIGHTS
        for name, content in {
            "empty": b"",
            "endless header": b"\xff" * 64,
            "endless shape": struct.pack("<Q", len(HEADER)) + HEADER,
        }.items()
    },
    **{f"{file} pickle": pickle_in(file) for file in (*WEIGHTS, "tokenizer.json")},
    "tokenizer of others": forged_code("tokenizer_config.json", AutoTokenizer="evil.Anything"),
    "pickled adapter": pickled("adapter_model.bin", without="adapter_model.safetensors"),
    "pickled backbone": pickled("backbone/pytorch_model.bin", without="backbone/model.safetensors"),
    "a pipe": instead("user_encoder.safetensors", os.mkfifo),
    "a directory": instead("user_encoder.safetensors", Path.mkdir),
    "a link to a device": instead(
        "user_encoder.safetensors", lambda path: path.symlink_to("/dev/zero")
    ),
}


def chosen(cases: dict[str, Any]) -> list[str]:
    """The names of every sixth case, or of all with FAULTS=full."""
    return list(cases)[::EVERY]


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module that leaves a file when it is imported."""
    monkeypatch.setenv(RAN, str(tmp_path / RAN))
    code = f"import pathlib\npathlib.Path({str(tmp_path / RAN)!r}).touch()\nAnything = dict\n"
    (tmp_path / "evil.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def outcome(work: Callable[..., Any], *arguments: Path) -> Any:
    """What came of it: what it returned, "refused" in one line, or the error that it raised."""
    try:
        return work(*arguments)
    except BadValue as error:
        return "refused" if str(error).isprintable() else f"unprintable: {error!s:.300}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.300}"


def rewards(export: Path) -> list[float]:
    return list(plrhf.load(export).score(ASKED).tolist())


@pytest.mark.slow
def test_forged_exports(reward_run: Path, hostile: Path) -> None:
    expected, faults = rewards(reward_run / "export"), []
    cases = {**{name: FORGED[name] for name in chosen(FORGED)}, **HARMLESS}
    for name, change in cases.items():
        export = hostile / "export"
        shutil.rmtree(export, ignore_errors=True)
        shutil.copytree(reward_run / "export", export)
        change(export)
        if name not in CARDS:
            seal(export)
        found = outcome(rewards, export)
        allowed = [expected] * (name in {*HARMLESS, *UNREAD}) + ["refused"] * (name not in HARMLESS)
        if found not in allowed or (hostile / RAN).exists():
            faults.append(f"{name}: {found}{' and ran' * (hostile / RAN).exists()}")
            (hostile / RAN).unlink(missing_ok=True)
    print(f"\n{len(cases)} forged exports, {len(HARMLESS)} of them harmless; faults: {faults}")
    assert faults == []


def settings_with(part: str, **values: Any) -> Change:
    def change(run: Path) -> None:
        path = run / "config.yaml"
        settings = yaml.safe_load(path.read_text())
        settings[part] = {**settings[part], **values} if part in settings else values
        write_settings(path, settings)

    return change


def yaml_text(text: str) -> Change:
    return lambda run: (run / "config.yaml").write_text(text)


def predictions_with(**columns: Any) -> Change:
    """Change columns of the predictions, None to remove one, with their digest."""

    def change(run: Path) -> None:
        table, results = pd.read_parquet(run / "predictions.parquet"), read_results(run)
        table = table.assign(**columns)
        table = table.drop(columns=[name for name, value in columns.items() if value is None])
        write_evaluation(run, results, table)

    return change


LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
RUNS: dict[str, Change] = {
    **{
        f"{part} {target}": settings_with(part, _target_=target)
        for part in ("data", "encoder", "aggregator", "model", "backbone", "optim", "logger")
        for target in ("evil.Anything", "os.system")
    },
    "no such source": settings_with("data", _target_="plrhf.evil.Anything"),
    "in a list": settings_with("samples", users=[{"_target_": "evil.Anything"}]),
    "trust": settings_with("backbone", trust_remote_code=True),
    "a tag": yaml_text('a: !!python/object/apply:os.system ["touch ran"]\n'),
    "laughs": yaml_text(LAUGHS),
    "deep yaml": yaml_text("[" * 20_000),
    "no yaml": yaml_text("\x00\x01: ["),
    "a text": yaml_text("evil"),
    "no margins": predictions_with(margin=None),
    "margins of text": predictions_with(margin="evil"),
    "margins of nothing": predictions_with(margin=float("nan")),
    "no users": predictions_with(user_id=None),
    "deep json": lambda run: (run / "results.json").write_text('{"config": ' + "[" * 100_000),
    "pickled predictions": pickled("predictions.parquet"),
}


def use(run: Path, out: Path) -> str:
    """Use a run as evaluation, report and comparison do."""
    RunConfig.of_run(run)
    write_report(run)
    compare([run], out)
    return "used"


@pytest.mark.slow
def test_forged_runs(reward_run: Path, hostile: Path) -> None:
    faults = []
    for name in chosen(RUNS):
        run = hostile / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(reward_run, run, ignore=shutil.ignore_patterns("export", "checkpoints"))
        RUNS[name](run)
        found = outcome(use, run, hostile / "out")
        if found != "refused" or (hostile / RAN).exists():
            faults.append(f"{name}: {found}{' and ran' * (hostile / RAN).exists()}")
            (hostile / RAN).unlink(missing_ok=True)
    print(f"\n{len(chosen(RUNS))} forged runs; faults: {faults}")
    assert faults == []


def test_forged_checkpoints(reward_run: Path, hostile: Path) -> None:
    for content in ({"state_dict": Runs()}, Runs(), {"state_dict": {}, "hyper_parameters": []}):
        path = hostile / "best.ckpt"
        torch.save(content, path)
        found = outcome(plrhf.PersonalRewardModel.load_from_checkpoint, path)
        assert found == "refused" and not (hostile / RAN).exists()
