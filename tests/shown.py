"""Runs commands as README and docs show them, made small, with tiny files in the place of a reader's."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import language_model
from transformers import PreTrainedTokenizerFast

from plrhf.backbone.tiny import tiny_gptj, train_tokenizer
from plrhf.cli import commands

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"(?:<!-- (?P<note>.*?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)
ENTRIES = {"train.py": commands.train, "eval.py": commands.evaluate, "plrhf": commands.plrhf}
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


class Block(NamedTuple):
    """A block of code of a page, and the comment in front of it, which says who runs it or why not."""

    note: str
    kind: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The blocks of code of a page."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(one["note"] or "", one["kind"], one["text"]) for one in found]


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a block: train.py, eval.py or plrhf, and its arguments."""
    for line in text.replace("\\\n", " ").splitlines():
        if found := re.match(r"(?:PYTHONPATH=\S+ )?(?:python )?(train\.py|eval\.py|plrhf) ", line):
            yield found[1], shlex.split(line[found.end() :], comments=True)


def file_of(block: Block) -> str | None:
    """The name of the file that a block shows, given by its first line; None if it shows none."""
    match = re.match(r"# (\S+\.(?:py|yaml))\n", block.text)
    return None if match is None else match[1]


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
    own_rows = "data=jsonl|experiment=(polis|ukp|frozen)"
    world = re.search(own_rows, given) is None
    extra += SMALL_WORLD if world else ["data.max_tokens=128", "data.min_pairs_per_user=20"]
    if re.search("experiment=(polis|ukp)", given):
        extra.append("data.path=rows.jsonl")
    own = "backbone=(hf|gptj_6b)|experiment=(polis|frozen|ukpconvarg1 |ablation/(?!backbone))"
    if not re.search(own, given + " "):
        extra += SMALL_BACKBONE
    elif "gptj_6b" in given:
        extra += ["backbone.path=language_model", "backbone.pad_token=null", "trainer=cpu"]
        if "plan=true" in arguments:  # which is of the architecture alone
            extra.append("backbone.architecture.n_layer=1")
    return extra


def run(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run train.py, eval.py or plrhf as its command line would, in this process."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.delenv(commands.STARTED, raising=False)
    try:
        ENTRIES[script]()
    except SystemExit as stop:
        pytest.fail(f"{script} ended with {stop.code} as {arguments}")


def stand_in(word: str, command: str, run_dir: str) -> str:
    """The argument with small files in the place of those a reader brings."""
    if word == "backbone.path=DIR":
        return "backbone.path=" + (
            "sentence_encoder" if "experiment" in command else "language_model"
        )
    if "experiment=quickstart" in command and word.startswith("seed="):  # others have two seeds
        return word.partition(",")[0]
    # A sweep over two values has all that one over more has.
    return re.sub(r"^([\w.]+=\w+),.*?(\w+)$", r"\1,\2", word.replace("RUN_DIR", run_dir))
