"""The command `plrhf`: its commands, their help, and settings given by position."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from plrhf.cli import commands
from plrhf.cli.commands import COMMANDS
from plrhf.cli.main import CONF


def called(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[str, str, list[str]]:
    """What a command line hands on: the config, the task, and the arguments that Hydra reads."""
    found: list[Any] = []
    monkeypatch.setattr(commands, "main", lambda config, task: found.append((config, task)))
    monkeypatch.setattr(sys, "argv", ["plrhf", *words])
    commands.plrhf()
    assert len(found) == 1
    return (*found[0], sys.argv[1:])


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["plrhf", *words])
    commands.plrhf()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "config", "handed_on"),
    [
        (("train", "seed=3", "-m"), "train", ["seed=3", "-m"]),
        (("plan", "backbone=gptj_6b"), "train", ["plan=true", "backbone=gptj_6b"]),
        (("compare", "runs=x"), "eval", ["eval=compare", "runs=x"]),
        (("train", "--config-dir", "my"), "train", ["--config-dir", "my"]),
        (("data", "inspect", "my rows.csv"), "inspect", ["data.path='my rows.csv'"]),
        (("data", "inspect", "ada's.csv"), "inspect", ["data.path='ada\\'s.csv'"]),
        (
            ("data", "convert", "polis", "out=b.jsonl", "a"),
            "convert",
            ["source='polis'", "out=b.jsonl", "path='a'"],
        ),
    ],
)
def test_commands(
    words: tuple[str, ...], config: str, handed_on: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = called(monkeypatch, *words)
    assert (found[0], found[2]) == (config, handed_on)


def test_processes_started_by_a_training_run_the_same_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lightning starts them as `SCRIPT SETTING=VALUE ...`, with their number in LOCAL_RANK."""
    monkeypatch.setenv(commands.STARTED, "unset")
    called(monkeypatch, "train", "trainer.devices=2")
    assert sys.argv[0] == "plrhf"
    assert commands.command_line() == "plrhf train trainer.devices=2"
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = called(monkeypatch, "trainer.devices=2")
    assert (found[0], found[2]) == ("train", ["trainer.devices=2"])


def test_every_command_has_settings_and_a_task() -> None:
    for name, command in COMMANDS.items():
        assert (CONF / f"{command.config}.yaml").is_file(), name
        module, _, function = command.task.rpartition(".")
        path = Path(CONF.parent, *module.split(".")).with_suffix(".py")
        assert f"def {function}(" in path.read_text(), name


def test_version_and_overview(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(capsys, monkeypatch, "--version") == f"plrhf {version('plrhf')}\n"
    overview = said(capsys, monkeypatch)
    assert overview == said(capsys, monkeypatch, "--help")
    assert all(f"  {name} " in overview for name in COMMANDS)


def test_unknown_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        said(capsys, monkeypatch, "trian")
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(
        "error: plrhf='trian' is not allowed: expected one of the commands train,"
    )
    assert line.count("\n") == 1


def test_a_missing_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "uvicorn" else True)
    with pytest.raises(SystemExit):
        said(capsys, monkeypatch, "serve", "RUN")
    assert "pip install -c constraints.txt '.[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = said(capsys, monkeypatch, *name.split(), "--help")
    assert text.startswith(f"plrhf {name} SETTING=VALUE ...\n")
    assert "  debug=false\n      true: a traceback for every error; true or false" in text or (
        COMMANDS[name].config not in ("train", "eval") and "  debug=false\n" in text
    )
    assert max(map(len, text.splitlines())) <= 108


def test_help_says_default_comment_and_what_is_allowed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = said(capsys, monkeypatch, "train", "encoder=cluster", "data=jsonl", "--help")
    flat = " ".join(text.split())
    encoders = sorted(path.stem for path in (CONF / "encoder").glob("*.yaml"))
    assert f"encoder=cluster of {', '.join(encoders)} " in flat
    assert "experiment=null of frozen_features," in flat and "method/*" in flat
    assert "optim.user_lr=0.0005 user encoder and aggregator; a number above 0" in flat
    assert "data.path=??? " in flat
    assert "encoder.n_clusters=" in flat and "a whole number from" in flat
    assert "data.split_by=prompt no two splits share a prompt or conversation;" in flat
    assert "prompt, conversation, response, pair or user" in flat
    assert "trainer.precision=32-true" in flat and "bf16-mixed or 16-mixed" in flat


def test_wrong_choices_in_help_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        said(capsys, monkeypatch, "train", "encoder=nobody", "--help")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: encoder='nobody' is not allowed: expected one of"
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("plrhf data ", ["convert", "inspect", "styles"]),
        ("plrhf nothing ", []),
        ("plrhf train encoder=clus", ["encoder=cluster"]),
        ("plrhf adapt eval.dra", ["eval.draws="]),
    ],
)
def test_what_a_shell_completes(
    line: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert said(capsys, monkeypatch, "-sc", "query=bash").split() == words


def test_zsh_gets_what_the_script_for_bash_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMP_LINE", raising=False)
    script = said(capsys, monkeypatch, "-sc", "install=zsh")
    assert script.index("bashcompinit") < script.index("-F hydra_bash_completion")


@pytest.mark.slow
def test_the_schema_takes_every_experiment_and_no_wrong_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = json.loads(said(capsys, monkeypatch, "train", "--schema"))
    check = jsonschema.Draft202012Validator(schema)
    for path in (CONF / "experiment").rglob("*.yaml"):
        faults = [one.message for one in check.iter_errors(yaml.safe_load(path.read_text()))]
        assert faults == [], path
    wrong: list[dict[str, Any]] = [{"modle": {}}, {"model": {"alpha": 2}}, {"seed": "one"}]
    assert [len([*check.iter_errors(one)]) for one in wrong] == [1, 1, 1]
    of_encoder = schema["properties"]["encoder"]["properties"]
    assert {"n_clusters", "rank"} <= set(of_encoder)  # of cluster, and of lookup
    assert "numbers a user" in of_encoder["rank"]["description"]
