"""Model folders that are not whole are refused in one line, never read as something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import save_model
from safetensors.torch import load_file, save_file

from plrhf.backbone.loading import load_model, load_tokenizer
from plrhf.core.errors import BadValue

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


def cut_short(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["transformer.h.1.mlp.fc_in.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def of_nothing(folder: Path) -> None:
    (folder / CONFIG).write_text("{}")


def with_kernel_of_the_hub(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["_attn_implementation"] = "somebody/attention"
    (folder / CONFIG).write_text(json.dumps(config))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (without(WEIGHTS), "a model's directory or a hub name"),
    "weights cut short": (cut_short(WEIGHTS), "a model's directory or a hub name"),
    "a weight missing": (
        without_a_weight,
        "a model with all its weights (lacking transformer.h.1.mlp.fc_in.weight). Save the model anew "
        "with save_pretrained.",
    ),
    "no config": (without(CONFIG), "a model's directory (with config.json) or a hub name"),
    "config cut short": (cut_short(CONFIG), "a model's directory or a hub name"),
    "config of nothing": (of_nothing, "a model's directory or a hub name"),
    "code of the hub": (
        with_kernel_of_the_hub,
        "a model whose attention is no code of the hub (somebody/attention). If you trust where it "
        "comes from, set backbone.trust_remote_code=true.",
    ),
    "no tokenizer": (without(TOKENIZER), "a directory or hub name with a tokenizer"),
    "tokenizer cut short": (cut_short(TOKENIZER), "a directory or hub name with a tokenizer"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_one_line(case: str, whole: Path, tmp_path: Path) -> None:
    damage, allowed = DAMAGES[case]
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    damage(folder)
    with pytest.raises(BadValue) as caught:
        load_model(str(folder))
        load_tokenizer(str(folder))
    line = str(caught.value)
    assert line.startswith(f"backbone.path='{folder}' is not allowed: expected {allowed}"), line
    assert "\n" not in line and len(line) < 400
