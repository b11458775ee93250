"""Texts of data=styles, written by a model that knows nothing: resumed, counted, and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import composed, world_tokenizer
from tiny import language_model

from plrhf.cli import make_styles as command
from plrhf.cli.make_styles import make_styles
from plrhf.data.style_prompts import STYLES
from plrhf.data.style_texts import read_texts

TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SMALL = ("n_prompts=5", "batch_size=3", "max_new_tokens=6", "temperature=1.5")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = world_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = language_model(vocabulary=len(tokenizer), positions=512)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def settings(model: Path, out: Path, *more: str) -> dict[str, Any]:
    return composed(f"backbone.path={model}", f"out={out}", *SMALL, *more, config="make_styles")


@pytest.mark.slow
def test_a_kill_costs_one_batch(
    chat_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, append = tmp_path / "texts.jsonl", command.append_texts
    calls: list[int] = []

    def killed_in_the_third(path: Path, texts: Any) -> None:
        if len(calls) == 2:
            path.write_text(path.read_text() + '{"prompt_id": "cut sh')
            raise KeyboardInterrupt
        calls.append(len(texts))
        append(path, texts)

    monkeypatch.setattr(command, "append_texts", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        make_styles(settings(chat_model, out))
    before = out.read_text().splitlines()[:-1]
    assert calls == [3, 3] and len(before) == 6
    monkeypatch.setattr(command, "append_texts", append)
    make_styles(settings(chat_model, out))
    texts = read_texts(out)
    assert out.read_text().splitlines()[:6] == before
    assert len({(text.prompt_id, text.style) for text in texts}) == len(texts) == 5 * len(STYLES)
    assert {text.style for text in texts} == set(STYLES)
    kept = [text for text in texts if text.dropped is None]
    assert len({text.key for text in kept}) == len(kept)
    said = capsys.readouterr().out
    assert f"{len(kept)} texts; dropped: " in said
    make_styles(settings(chat_model, out))  # nothing is left to do
    assert read_texts(out) == texts


@pytest.mark.slow
def test_the_style_is_asked_for_and_not_shown(chat_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "texts.jsonl"
    make_styles(settings(chat_model, out, "n_prompts=1"))
    for line in out.read_text().splitlines():
        one = json.loads(line)
        assert STYLES[one["style"]].instruction not in one["prompt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "max_new_tokens=500",
            r"max_new_tokens=500 is not allowed: expected at most \d+, as a prompt",
        ),
        ("n_prompts=5000", r"n_prompts=5000 is not allowed: expected at most \d+\. Set n_prompts="),
        ("backbone.path=nowhere/at/all", r"backbone\.path='nowhere/at/all' is not allowed"),
        (
            "top_p=0",
            r"top_p=0.* is not allowed: expected a number above 0, at most 1\. Set top_p=1",
        ),
    ],
)
def test_wrong_settings(chat_model: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_styles(settings(chat_model, tmp_path / "texts.jsonl", change))
