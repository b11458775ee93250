"""The authors' experiments, on small files of upstream's format and a random model of their kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from runs import check_run, launch, save_model
from transformers import AutoTokenizer
from upstream import (
    many_comparisons,
    many_dialogues,
    write_comparisons,
    write_prism,
    write_soups,
)

from plrhf.cli.main import CONF

DIVIDED = {"tldr_gptj_6b": ["data.n_seen=2"]}  # upstream says which rows are the test
OTHERS_DIVIDED = ["data.unseen_fraction=0.4", "data.test_fraction=0.3"]
MODELS = {"tldr_gptj_6b": "gptj", "psoups_tulu_7b": "llama", "prism_llama3_8b": "llama"}

# The table of the authors' scripts: beta, prompt and total tokens, epochs, LoRA alpha and dropout.
SETTINGS = {
    "tldr_gptj_6b": (0.5, 550, 600, 2, 16, 0.05),
    "psoups_tulu_7b": (0.1, 200, 1000, 2, 32, 0.1),
    "prism_llama3_8b": (0.5, 470, 770, 1, 16, 0.05),
}
OF_ALL = {"lr": 5e-5, "user_lr": 5e-5, "warmup_steps": 150, "schedule": "cosine"}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("upstream")
    return {
        "tldr_gptj_6b": write_comparisons(folder / "tldr", many_comparisons()),
        "psoups_tulu_7b": write_soups(folder / "psoups"),
        "prism_llama3_8b": write_prism(folder / "prism", *many_dialogues()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_authors_experiments(name: str, upstream: dict[str, Path], tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", MODELS[name])
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(model)
    launch(
        "train",
        *(f"experiment={name}", f"data.path={upstream[name]}", f"backbone.path={model}"),
        *("backbone.pad_token=null", "backbone.dtype=float32", "trainer=cpu", "samples.users=1"),
        *("trainer.max_steps=2", "trainer.accumulate_grad_batches=2", "samples.prompts=1"),
        *("data.batch_size=4", "data.eval_batch_size=8"),
        *("trainer.val_every_n_steps=1", "data.val_fraction=0.3"),
        *("data.max_prompt_tokens=40", "data.max_tokens=110", "samples.max_new_tokens=4"),
        *DIVIDED.get(name, OTHERS_DIVIDED),
        f"run_dir={tmp_path / 'run'}",
    )
    results = check_run(tmp_path / "run", oracle=name == "tldr_gptj_6b", generations=True)
    assert results["data"]["rows"]["train"] > 0 and results["data"]["rows"]["test"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_authors_settings(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose("train", overrides=[f"experiment={name}"])
    beta, prompt_tokens, tokens, epochs, lora_alpha, dropout = SETTINGS[name]
    assert (node.model.name, node.model.alpha, node.model.beta) == ("dpo", 0.5, beta)
    assert (node.data.max_prompt_tokens, node.data.max_tokens) == (prompt_tokens, tokens)
    lora = node.backbone.lora
    assert (lora.r, lora.alpha, lora.dropout) == (8, lora_alpha, dropout)
    assert (node.aggregator.name, node.aggregator.n_tokens) == ("soft_prompt", 10)
    assert node.encoder.init == "vocabulary"
    assert node.encoder.get("n_clusters") == (10 if name == "prism_llama3_8b" else None)
    assert {key: node.optim[key] for key in OF_ALL} == OF_ALL
    assert node.trainer.max_epochs == epochs
    assert (node.data.batch_size, node.trainer.accumulate_grad_batches) == (32, 1)
    assert (node.trainer.name, node.trainer.devices, node.trainer.num_nodes) == ("zero3", 8, 1)
