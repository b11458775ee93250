"""What checkpoints hold, and what is left where one cannot be written."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LORA, language_model, make_model
from transformers import AutoModelForCausalLM, LlamaConfig

from plrhf.backbone.loading import load_backbone
from plrhf.backbone.model import Backbone
from plrhf.core.errors import BadValue
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.sft import SupervisedPolicy
from plrhf.training.checkpoints import AtomicCheckpointIO, read_checkpoint


def complete(**content: Any) -> dict[str, Any]:
    """A checkpoint that has all that one of a run has."""
    needed = ("state_dict", "optimizer_states", "loops", "random_states", "train_loader")
    return {**dict.fromkeys(needed, {}), **content}


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB, which ends writing as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(complete(step=1), path)
    too_large = complete(step=2, state_dict={"weight": torch.ones(2**16)})
    with pytest.raises(BadValue) as error:
        AtomicCheckpointIO().save_checkpoint(too_large, path)
    assert str(error.value).startswith("run_dir=") and "\n" not in str(error.value)
    assert "expected a directory with room for a checkpoint. Make room, " in str(error.value)
    assert read_checkpoint(path)["step"] == 1
    assert [one.name for one in path.parent.iterdir()] == ["last.ckpt"]


def tied_llama() -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, intermediate_size=48, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config)


def test_a_frozen_head_that_is_tied_is_not_kept() -> None:
    backbone = Backbone(model=tied_llama(), trainable="lora", lora=LORA)
    models = [
        make_model(PersonalDPOPolicy, backbone=backbone, aggregator="film_last"),
        SupervisedPolicy(backbone=backbone, optim=None),  # type: ignore[arg-type]
    ]
    for model in models:
        checkpoint = {"state_dict": model.state_dict()}
        assert any("lm_head" in name for name in checkpoint["state_dict"])
        model.on_save_checkpoint(checkpoint)
        learned = {name for name, one in model.named_parameters() if one.requires_grad}
        buffers = {name for name, _ in model.named_buffers()}
        assert learned <= checkpoint["state_dict"].keys() <= learned | buffers


def test_a_weight_without_dimensions_is_hashed_and_kept(tmp_path: Path) -> None:
    model = language_model()
    model.register_parameter("scale", torch.nn.Parameter(torch.tensor(0.75)))
    backbone = Backbone(model=model, trainable="frozen")
    before = backbone.digest
    with torch.no_grad():
        backbone.model.scale.mul_(2)  # type: ignore[operator, union-attr]
    del backbone.digest
    assert backbone.digest != before
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(complete(state_dict={"scale": torch.tensor(0.75)}), path)
    assert read_checkpoint(path)["state_dict"]["scale"] == torch.tensor(0.75)


def trained(backbone: Backbone, n_steps: int) -> dict[str, torch.Tensor]:
    """Weights after small steps, computed in bfloat16, towards the likelihood of some text."""
    ids = torch.arange(60).view(4, 15) % 97
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-5, weight_decay=0.0)
    for _ in range(n_steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = backbone.model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: one.detach().clone() for name, one in backbone.named_parameters()}


def test_small_steps_move_all_weights_of_a_bfloat16_model() -> None:
    """With weights in bfloat16 themselves half of them would stay where they are."""
    half, single = (
        Backbone(model=language_model("llama").to(torch.bfloat16).to(dtype), trainable="full")
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert {one.dtype for one in half.parameters()} == {torch.float32}
    start = {name: one.detach().clone() for name, one in half.named_parameters()}
    found, expected = trained(half, 3), trained(single, 3)
    moved = sum(int((found[name] != one).sum()) for name, one in start.items())
    never_asked = 37 * 32  # embeddings of tokens 60 to 96, of which the text has none
    assert moved > 0.99 * (sum(one.numel() for one in start.values()) - never_asked)
    for name, value in expected.items():
        assert found[name].equal(value), name


def test_weights_that_are_learned_in_full_are_read_in_full(tmp_path: Path) -> None:
    language_model("llama").save_pretrained(tmp_path)
    backbone = load_backbone(path=str(tmp_path), dtype="bfloat16", trainable="full", lora=None)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, value in backbone.model.state_dict().items():
        assert value.equal(whole[name]), name


def test_adapters_of_a_bfloat16_model_are_float32(tmp_path: Path) -> None:
    language_model("llama").save_pretrained(tmp_path)
    backbone = load_backbone(path=str(tmp_path), dtype="bfloat16", trainable="lora", lora=LORA)
    dtypes = {(one.requires_grad, one.dtype) for one in backbone.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
