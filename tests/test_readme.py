"""Every command of the README and of the pages beside it runs, made small, on tiny files."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from tiny import language_model
from transformers import PreTrainedTokenizerFast

from plrhf.backbone.tiny import tiny_gptj, train_tokenizer
from plrhf.cli import commands

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/user_models.md", "docs/rows.md", "docs/results.md")
BEGINNINGS = {"docs/adaptation.md": "Which pairs to ask", "docs/scaling.md": "How memory"}
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
SMALL = ["trainer.max_steps=2", "trainer.max_epochs=null", "trainer.progress=false"]
SMALL_WORLD = [
    "data.n_users=6",
    "data.n_unseen_users=2",
    "data.pairs_per_user=8",
    "data.n_prompts=40",
]
SMALL_BACKBONE = [
    "backbone.tiny={vocab_size:300,n_layers:2,width:32,n_heads:2,max_positions:512}",
    "backbone.sft.max_steps=2",
    "backbone.sft.batch_size=8",
]


def blocks(language: str) -> list[str]:
    """The blocks of code of all pages in a language."""
    text = "".join((ROOT / page).read_text() for page in PAGES)
    return [code for kind, code in FENCE.findall(text) if kind == language]


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


def commands_of(section: str) -> list[str]:
    """Commands of train.py, eval.py and plrhf that a section shows and none before it."""
    found: dict[str, str] = {}
    for name, text in sections().items():
        shown = [code for kind, code in FENCE.findall(text) if kind == "bash"]
        lines = [line.split("  #")[0].strip() for block in shown for line in block.splitlines()]
        for line in lines:
            if re.search(r"train\.py|eval\.py|^plrhf ", line):
                found.setdefault(line, name)
    return [line for line, name in found.items() if name == section]


def rows(path: Path, n_users: int = 4) -> None:
    """Preference rows as a newcomer would bring them: enough per user for every experiment."""
    records = [
        {
            "prompt": f"Say something about thing {place % 35}.",
            "chosen": f"It is good number {place} for user {user}.",
            "rejected": f"It is bad number {place}, {user}.",
            "user_id": f"user-{user}",
        }
        for user in range(n_users)
        for place in range(140)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def save_models() -> None:
    """A causal model and a bidirectional one, each with a tokenizer, as `save_pretrained` leaves them."""
    tokenizer = train_tokenizer(
        ["Say something about thing 1. It is good number 2."], vocab_size=300
    )
    model = tiny_gptj(
        vocab_size=300, n_layers=2, width=32, n_heads=2, max_positions=2048, eos_token_id=0
    )
    model.save_pretrained("language_model")
    tokenizer.save_pretrained("language_model")
    language_model("bert", vocabulary=300, positions=512).save_pretrained("sentence_encoder")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        cls_token="<|endoftext|>",
        sep_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    ).save_pretrained("sentence_encoder")


def small(arguments: list[str]) -> list[str]:
    """The command's overrides, and those that make it a matter of a second."""
    given = " ".join(arguments)
    extra = list(SMALL)
    world = "data=jsonl" not in given and not re.search("experiment=(polis|ukp)", given)
    extra += SMALL_WORLD if world else ["data.max_tokens=128", "data.min_pairs_per_user=20"]
    if re.search("experiment=(polis|ukp)", given):
        extra.append("data.path=rows.jsonl")
    own = "backbone=(hf|gptj_6b)|experiment=(polis|ukpconvarg1 |ablation/(?!backbone))"
    if not re.search(own, given + " "):
        extra += SMALL_BACKBONE
    elif "gptj_6b" in given:
        extra += ["backbone.path=language_model", "backbone.pad_token=null", "trainer=cpu"]
    return extra


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader brings: rows, models, an encoder."""
    folder = tmp_path_factory.mktemp("files")
    with contextlib.chdir(folder):
        save_models()
    for name in ("rows.jsonl", "other.jsonl"):
        rows(folder / name)
    code = next(text for text in blocks("python") if text.startswith("# my_encoder.py"))
    (folder / "my_encoder.py").write_text(code)
    return folder


def run(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run train.py, eval.py or plrhf as its command line would, in this process."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        {"train.py": commands.train, "eval.py": commands.evaluate, "plrhf": commands.plrhf}[
            script
        ]()
    except SystemExit as stop:
        pytest.fail(f"{script} ended with {stop.code} as {arguments}")


WITH_COMMANDS = [section for section in sections() if commands_of(section)]


def test_commands_stand_in_several_sections() -> None:
    assert len(WITH_COMMANDS) > 5
    assert sum(len(commands_of(section)) for section in WITH_COMMANDS) > 30


@pytest.mark.slow
@pytest.mark.parametrize("section", WITH_COMMANDS)
def test_commands_run(
    section: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in files.iterdir():
        (tmp_path / one.name).symlink_to(one)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    run_dir = "runs/given"
    if "eval.py" in commands_of(section)[0]:
        run("train.py", [*small([]), f"run_dir={run_dir}"], monkeypatch)
    for command in commands_of(section):
        words = [word for word in shlex.split(command) if not word.startswith("PYTHONPATH")]
        script, *others = words[1:] if words[0] == "python" else words
        arguments = [stand_in(word, command, run_dir) for word in others]
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
        if "eval=adapt" in command:
            code = next(text for text in blocks("python") if "model.adapt(" in text)
            exec(code.replace("RUN_DIR", run_dir), {})


def stand_in(word: str, command: str, run_dir: str) -> str:
    """The argument with small files in the place of those a reader brings."""
    if word == "backbone.path=DIR":
        return "backbone.path=" + (
            "sentence_encoder" if "experiment" in command else "language_model"
        )
    # A sweep over two values has all that one over more has.
    return re.sub(r"^([\w.]+=\w+),.*?(\w+)$", r"\1,\2", word.replace("RUN_DIR", run_dir))


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
