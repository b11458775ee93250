"""Weights read into shards are those that `from_pretrained` reads, of every family."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import language_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from plrhf.backbone.loading import load_model
from plrhf.backbone.sharded_loading import fill_shards
from plrhf.core.errors import BadValue

SHAPE: dict[str, Any] = {
    "vocab_size": 89,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True, **SHAPE},
    "gpt2, tied": {"model_type": "gpt2", "vocab_size": 89, "n_embd": 24, "n_layer": 2, "n_head": 4},
    "gemma, tied": {"model_type": "gemma", "head_dim": 6, **SHAPE},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 3, **SHAPE, **EXPERTS},
    "gpt_neox": {"model_type": "gpt_neox", **SHAPE},
    "qwen2_moe": {
        **{"model_type": "qwen2_moe", "num_experts": 11, **SHAPE, **EXPERTS},
        "shared_expert_intermediate_size": 28,
    },
}


def saved(family: str, directory: Path) -> PreTrainedModel:
    """A random model of a family, saved in several files, as its own `from_pretrained` reads it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[family]))
    model.save_pretrained(directory, max_shard_size="20KB")
    return AutoModelForCausalLM.from_pretrained(directory)


def empty(config: Any) -> PreTrainedModel:
    """A model without values, as `load_model` makes it before it is filled."""
    with no_init_weights():
        return AutoModelForCausalLM.from_config(config)


def fake_shards(model: PreTrainedModel, n_processes: int) -> None:
    """Take a model's values away and leave room for one of so many shards, as DeepSpeed does."""
    for number, parameter in enumerate(model.parameters()):
        whole: Any = parameter
        whole.ds_id, whole.ds_shape, whole.ds_numel = number, parameter.shape, parameter.numel()
        whole.ds_tensor = torch.full([-(-parameter.numel() // n_processes)], torch.nan)
        whole.ds_tensor.final_location = whole.ds_process_group = None
        parameter.data = torch.empty(0)


def read_by(
    rank: int, n_processes: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """What a process has read of each parameter."""
    model = empty(AutoConfig.from_pretrained(path))
    fake_shards(model, n_processes)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
    fill_shards(model, str(path))
    every = model.named_parameters(remove_duplicate=False)
    return {name: value.ds_tensor for name, value in every}  # type: ignore[attr-defined]


@pytest.mark.parametrize("n_processes", [1, 2, 5])
def test_shards_are_read_as_the_whole_is(
    n_processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    monkeypatch.setattr(
        "plrhf.backbone.sharded_loading.READ_AT_ONCE", 71
    )  # rows are cut, of 32 or 128 numbers
    shards = [read_by(rank, n_processes, tmp_path, monkeypatch) for rank in range(n_processes)]
    for name, whole in AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters():
        found = torch.cat([one[name] for one in shards])
        assert found[: whole.numel()].view(whole.shape).equal(whole), name
        assert found[whole.numel() :].isnan().all()


def test_weights_that_are_not_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    wrong = {**weights, "transformer.ln_f.weight": torch.ones(31)}
    lacking = {name: value for name, value in weights.items() if name != "lm_head.bias"}
    for content, message in (
        (
            wrong,
            "model.safetensors transformer.ln_f.weight=[31] is not allowed: expected shape [32], as "
            "config.json says. Save the model anew with save_pretrained.",
        ),
        (
            lacking,
            f"backbone.path={str(tmp_path)!r} is not allowed: expected a model with all its "
            "weights (lacking lm_head.bias). Save the model anew with save_pretrained.",
        ),
    ):
        save_file(content, file, metadata={"format": "pt"})
        with pytest.raises(BadValue) as error:
            read_by(1, 2, tmp_path, monkeypatch)
        assert str(error.value) == message


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_of_every_family(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dict(saved(family, tmp_path).named_parameters(remove_duplicate=False))
    shards = [read_by(rank, 3, tmp_path, monkeypatch) for rank in range(3)]
    assert whole.keys() == shards[0].keys()
    for name, value in whole.items():
        found = torch.cat([one[name] for one in shards])
        assert found[: value.numel()].view(value.shape).equal(value), name


def test_tied_weights_share_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("llama, tied", tmp_path)
    shards = read_by(0, 2, tmp_path, monkeypatch)
    assert shards["lm_head.weight"] is shards["model.embed_tokens.weight"]


@pytest.mark.parametrize("differ", [False, True])
def test_files_with_both_of_two_tied_weights(
    differ: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are tied where they are the same, as `from_pretrained` does."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**FAMILIES["llama, tied"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + (1.0 if differ else 0.0)
    save_file(weights, file, metadata={"format": "pt"})
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    shards = read_by(0, 1, tmp_path, monkeypatch)
    for name, value in whole.named_parameters(remove_duplicate=False):
        assert shards[name].view(value.shape).equal(value), name
    assert (shards["lm_head.weight"] is shards["model.embed_tokens.weight"]) != differ


def test_a_weight_without_dimensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    model.register_parameter("scale", torch.nn.Parameter(torch.tensor(0.75)))
    file = tmp_path / "model.safetensors"
    save_file({name: value.detach() for name, value in model.named_parameters()}, file)
    fake_shards(model, 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)
    fill_shards(model, str(tmp_path))
    assert model.scale.ds_tensor.tolist() == [0.75]  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("shards", [None, contextlib.nullcontext])
def test_a_cut_file_of_weights(shards: Any, tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(
        BadValue, match=r"^backbone\.path=.* is not allowed: expected a model's dir"
    ):
        load_model(str(tmp_path), shards=shards)
