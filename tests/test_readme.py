"""Every command of the README and of the pages beside it runs, made small, on tiny files."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from shown import FENCE, ROOT, blocks_of, commands_of, rows, run, save_models, small, stand_in

PAGES = ("README.md", "docs/user_models.md", "docs/rows.md", "docs/results.md")
BEGINNINGS = {"docs/adaptation.md": "Which pairs to ask", "docs/scaling.md": "How memory"}


def python_block(words: str) -> str:
    """The block of Python of a page that has these words."""
    blocks = [one for page in PAGES for one in blocks_of(ROOT / page)]
    return next(one.text for one in blocks if one.kind == "python" and words in one.text)


def sections() -> dict[str, str]:
    """The pages' text by page and heading."""
    found: dict[str, str] = {}
    for page in PAGES:
        first, *parts = re.split(r"^## (.+)$", (ROOT / page).read_text(), flags=re.MULTILINE)
        found[page] = first
        for heading, text in zip(parts[::2], parts[1::2], strict=True):
            found[f"{page}: {heading}"] = text
    return {**found, **{page: beginning(page) for page in BEGINNINGS}}


def beginning(page: str) -> str:
    """The page's text up to the heading in BEGINNINGS."""
    text = (ROOT / page).read_text()
    return text[: text.index(f"\n## {BEGINNINGS[page]}")]


def shown_commands() -> dict[str, list[tuple[str, list[str]]]]:
    """Commands of train.py, eval.py and plrhf that a section shows and none before it, by section."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    seen: set[str] = set()
    for name, text in sections().items():
        blocks = [
            block["text"]
            for block in FENCE.finditer(text)
            if block["kind"] == "bash" and not (block["note"] or "").startswith("not run")
        ]
        for script, words in (one for block in blocks for one in commands_of(block)):
            if (line := " ".join([script, *words])) not in seen:
                found.setdefault(name, []).append((script, words))
            seen.add(line)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader brings: rows, models, an encoder."""
    folder = tmp_path_factory.mktemp("files")
    with contextlib.chdir(folder):
        save_models()
    for name in ("rows.jsonl", "other.jsonl"):
        rows(folder / name)
    (folder / "my_encoder.py").write_text(python_block("# my_encoder.py"))
    return folder


COMMANDS = shown_commands()


def test_commands_stand_in_several_sections() -> None:
    assert len(COMMANDS) > 5
    assert sum(map(len, COMMANDS.values())) > 30


@pytest.mark.slow
@pytest.mark.parametrize("section", COMMANDS)
def test_commands_run(
    section: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in files.iterdir():
        (tmp_path / one.name).symlink_to(one)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    run_dir = "runs/given"
    if COMMANDS[section][0][0] == "eval.py":
        run("train.py", [*small([]), f"run_dir={run_dir}"], monkeypatch)
    for script, words in COMMANDS[section]:
        arguments = [stand_in(word, " ".join(words), run_dir) for word in words]
        if script == "train.py":
            arguments += small(arguments)
            if not any(word.startswith("run_dir=") for word in arguments):
                run_dir = f"runs/{len(list(Path().glob('runs/*')))}"
                arguments.append(f"run_dir={run_dir}")
        if "eval=adapt" in arguments:
            arguments.append("eval.shots=[0,1,2]")  # of the few pairs there are
        if "eval=referee" in arguments:  # all methods are built by tests/cli/test_conf.py
            arguments += ["eval.methods=[vanilla,lookup,length]", "eval.trials=1"]
            arguments += ["eval.shots=[0,1]", "eval.draws=1"]
        run(script, arguments, monkeypatch)
        if "eval=adapt" in arguments:
            exec(python_block("model.adapt(").replace("RUN_DIR", run_dir), {})


def test_exports_are_used_as_shown(reward_run: Path, policy_run: Path) -> None:
    code = python_block("REWARD_DIR").replace("REWARD_DIR", str(reward_run))
    code = code.replace('"ada"', "None").replace("=64", "=4")
    found: dict[str, Any] = {}
    exec(code.replace("POLICY_DIR", str(policy_run)), found)
    assert len(found["rewards"]) == len(found["texts"]) == 1


def test_numbers_name_their_command() -> None:
    """Every table of figures stands under a block of commands or a `make` target."""
    parts = re.split(r"\n(?=## )", (ROOT / "docs/results.md").read_text())[1:]
    assert len(parts) > 0
    for part in parts:
        assert "```bash" in part, part.splitlines()[0]


def speed_table() -> list[str]:
    """The lines of the table of speeds, from what `make benchmark` wrote."""
    found = json.loads((ROOT / "docs/benchmark.json").read_text())
    columns = {
        "dpo": ("vs_authors_recipe", "vs_precomputed_reference", "soft_prompt_vs_authors_recipe"),
        "reward": ("vs_trl",),
    }
    lines = []
    for shape, ratios in found["ratios"].items():
        cells = [
            f"{found[part][shape][model][key]:.1f}"
            for part in ("ratios", "memory")
            for model, keys in columns.items()
            for key in keys
            if part == "ratios" or key == "vs_authors_recipe"
        ]
        half = ratios["dpo"]["bfloat16_vs_float32"]
        lines.append(f"| {shape} | {' | '.join(cells)} | {half:.1f} |")
    return lines


def test_speeds_are_those_of_the_benchmark() -> None:
    lines = speed_table()
    assert len(lines) > 0
    for line in lines:
        assert line in (ROOT / "docs/performance.md").read_text(), line
