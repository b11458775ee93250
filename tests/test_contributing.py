"""The parts that CONTRIBUTING.md adds are real: they run, and their command trains a model."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from runs import ROOT, TINY

from plrhf.cli.main import main

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(TEXT) if kind == language]


@pytest.mark.slow
def test_the_parts_shown_train_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_parts.py").write_text("\n\n".join(blocks("python")))
    for settings in blocks("yaml"):
        path = Path(settings.splitlines()[0].removeprefix("# "))
        path.parent.mkdir(parents=True)
        path.write_text(settings)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = next(line for line in blocks("bash")[1].splitlines() if "train.py" in line)
    small = [one for one in TINY if not one.startswith("data.")]
    words = [*shlex.split(command)[2:], *small, f"cache_dir={cache_dir}", "run_dir=run"]
    monkeypatch.setattr(sys, "argv", words)
    main("train", "plrhf.cli.run.train")
    assert (tmp_path / "run" / "report.html").is_file()
    monkeypatch.delitem(sys.modules, "my_parts")


def test_the_settings_shown_are_those_of_the_encoder_shown() -> None:
    settings = next(text for text in blocks("yaml") if "encoder" in text)
    target = yaml.safe_load(settings)["_target_"]
    assert f"class {target.rpartition('.')[2]}(UserEncoder)" in blocks("python")[0]


def test_the_make_targets_shown_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
