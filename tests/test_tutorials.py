"""Every block of code of the docs is run, or says why not; tutorials are run here, made small."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import test_readme
from runs import composed
from shown import ROOT, blocks_of, commands_of, file_of, rows, run, save_models, small, stand_in

from plrhf.cli.commands import COMMANDS
from plrhf.cli.config import RunConfig
from plrhf.cli.main import as_hydra_takes_them

PAGES = sorted((ROOT / "docs").rglob("*.md"))
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
LITTLE = {"adapt": ["eval.draws=1", "eval.shots=[0,1]"], "generate": ["eval.max_new_tokens=3"]}
"""Settings that make a command of plrhf quick."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_block_is_run_or_says_why_not(page: Path) -> None:
    run_here = page in TUTORIALS or f"docs/{page.name}" in test_readme.PAGES
    for block in blocks_of(page):
        if run_here and block.note == "" or block.kind not in ("bash", "python"):
            continue
        assert re.match(r"run by tests/\S+$|not run: .{10}", block.note), block.text
        if block.note.startswith("run by "):
            assert page.name in (ROOT / block.note.removeprefix("run by ")).read_text()


NOT_RUN = {
    line
    for page in PAGES
    for block in blocks_of(page)
    if block.note.startswith("not run") and block.kind == "bash"
    for line in block.text.replace("\\\n", " ").splitlines()
}


@pytest.mark.slow
def test_settings_of_what_is_not_run_are_real() -> None:
    """Each command is composed and checked as it would be before it runs; scripts have each option."""
    checked = 0
    for line in sorted(NOT_RUN):
        line = line.replace("ablation/NAME", "ablation/alpha").replace("$BF16", "")
        if "optuna" in line:  # a plugin that is not installed here
            continue
        for script, words in commands_of(line):
            check_settings(script, words)
            checked += 1
        if found := re.match(r"python (benchmarks/\S+\.py)(.*)", line):
            text = (ROOT / found[1]).read_text()
            for option in re.findall(r"--[\w-]+", found[2]):
                assert f'"{option}"' in text, (found[1], option)
            checked += 1
    assert checked > 30


def check_settings(script: str, words: list[str]) -> None:
    """Compose the settings of a command, and check those of a training."""
    name = {"train.py": "train", "eval.py": "eval"}.get(script)
    if name is None:
        size = 2 if " ".join(words[:2]) in COMMANDS else 1
        name, words = " ".join(words[:size]), words[size:]
    command = COMMANDS[name]
    given = [word for word in words if "=" in word]
    if "-m" in words:  # the first job of a sweep
        given = [re.sub(r"^([^\[({,]*),.*", r"\1", word) for word in given]
    given = as_hydra_takes_them([*command.given, *given])
    settings = composed(*given, config=command.config)
    if command.config == "train":
        RunConfig.parse(settings)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader brings: rows, and a language model in DIR."""
    folder = tmp_path_factory.mktemp("files")
    with contextlib.chdir(folder):
        save_models()
    rows(folder / "rows.jsonl")
    return folder


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorials(
    page: Path, files: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in files.iterdir():
        (tmp_path / one.name).symlink_to(one)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.note.startswith("not run"):
            continue
        if (name := file_of(block)) is not None:
            Path(name).write_text(block.text)
        elif block.kind == "python":
            exec(block.text, names)
        for script, words in commands_of(block.text) if block.kind == "bash" else ():
            run(script, made_small(words, cache_dir), monkeypatch)


def made_small(words: list[str], cache_dir: Path) -> list[str]:
    """The command's words, and those that make it a matter of a second."""
    words = [stand_in(word, " ".join(words), "") for word in words]
    if words[0] == "train":
        return [*words, *small(words), "data.min_pairs_per_user=1", f"cache_dir={cache_dir}"]
    if words[0] == "plan":  # of a small model: GPT-J 6B takes a while to lay out
        return [*words, "backbone.path=language_model"]
    if words[0] == "forget":
        return [word.replace(".cache/plrhf", str(cache_dir)) for word in words]
    return [*words, *LITTLE.get(words[0], [])]


def test_the_page_on_adaptation(reward_run: Path) -> None:
    """docs/adaptation.md"""
    page = ROOT / "docs" / "adaptation.md"
    [code] = [one.text for one in blocks_of(page) if one.kind == "python"]
    names: dict[str, Any] = {}
    exec(code.replace("RUN_DIR", str(reward_run)), names)
    assert names["user"].vector.isfinite().all()


def test_commands_are_split_as_a_shell_does() -> None:
    text = "PYTHONPATH=. python eval.py runs='a/*' \\\n  out=b  # why\nplrhf train a=1\nmake docs\n"
    assert [*commands_of(text)] == [("eval.py", ["runs=a/*", "out=b"]), ("plrhf", ["train", "a=1"])]
