"""Saves and loads what was learned: an adapter or a whole Hugging Face model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from plrhf.backbone.quantization import is_quantized
from plrhf.backbone.sharding import gathered, is_sharded
from plrhf.core.errors import bad_value

ADAPTER = "adapter_model.safetensors"


def without_frozen(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without the module's frozen weights, including tied ones.

    Frozen weights are those of the pretrained model and need not be saved. The extra tensors of
    quantised layers are left out as well.
    """
    every = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, value in every if not value.requires_grad}
    quantized = tuple(f"{name}." for name, one in module.named_modules() if is_quantized(one))
    return {
        name: value
        for name, value in state.items()
        if name not in frozen and not name.startswith(quantized)
    }


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Write the adapter of a PEFT model in PEFT's format. Every process must call it; rank 0 writes."""
    learned = [one for one in model.parameters() if one.requires_grad]
    with gathered(learned):
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            model.save_pretrained(str(directory), save_embedding_layers=False)
            (directory / "README.md").unlink(missing_ok=True)  # PEFT's template, not filled in


def load_adapter(model: PeftModel, directory: Path) -> None:
    """Load the adapter that `save_adapter` wrote.

    Raises:
        ValueError: the file is damaged, or its tensors do not match the model's adapter.
    """
    state = read_tensors(directory / ADAPTER)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    check_tensors(state, own, ADAPTER)
    set_peft_model_state_dict(model, state)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: the file is missing or damaged.
    """
    if not path.is_file():  # a pipe would be waited for
        raise bad_value(path.name, str(path), "a file", "Export the model anew")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise bad_value(
            path.name, str(path), "a whole safetensors file", f"Export anew ({error})"
        ) from error


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    """Raise a ValueError unless `state` has the names and shapes of `expected` and finite real numbers.

    Args:
        origin: file of `state`, for messages.
    """
    for name in {**expected, **state}:
        found, wanted = (
            tuple(one[name].shape) if name in one else None for one in (state, expected)
        )
        if found != wanted:
            allowed = "no such tensor" if wanted is None else f"shape {wanted}"
            raise bad_value(f"{origin} {name}", found, allowed, "Export the model anew")
        value = state[name]
        if not expected[name].is_floating_point():
            continue
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            given = "nan or inf" if value.is_floating_point() else str(value.dtype)
            raise bad_value(
                f"{origin} {name}", given, "finite real numbers", "Export the model anew"
            )


def save_whole(
    model: PreTrainedModel | PeftModel, directory: Path, *, shard_bytes: int = 2**30
) -> None:
    """Write a plain Hugging Face model with LoRA merged into its weights.

    Sharded weights are gathered a few at a time. Rank 0 writes files of about `shard_bytes` each.
    Weights that the directory has from an earlier save are removed first: transformers would read
    ``model.safetensors`` before the files of an index.
    """
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        for old in directory.glob("model*.safetensors*"):
            old.unlink()
    if not any(is_sharded(one) for one in model.parameters()):
        merged(model).save_pretrained(directory)
        return
    writer = ShardWriter(directory, shard_bytes=shard_bytes)
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    written: set[int] = set()
    module: Any
    for path, module in bare.named_modules():
        if isinstance(module, LoraLinear):
            with gathered(list(module.parameters())), torch.no_grad():
                for name, value in module.get_base_layer().named_parameters():
                    change = module.get_delta_weight("default") if name == "weight" else 0
                    writer.add(f"{path}.{name}", value + change)
            written.update(id(one) for one in module.parameters())
    for name, value in bare.named_parameters():
        if id(value) not in written:
            with gathered([value]):
                writer.add(name, value)
    writer.close()
    if writer.writes:
        bare.config.save_pretrained(directory)


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the plain Hugging Face model with LoRA merged into its weights."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


class ShardWriter:
    """Writes tensors to safetensors files of limited size, and the index that transformers reads.

    Args:
        directory: is made if needed. shard_bytes: a file is closed when it reaches this size.
    """

    def __init__(self, directory: Path, *, shard_bytes: int) -> None:
        self.directory, self.shard_bytes = directory, shard_bytes
        self.held: dict[str, Tensor] = {}
        self.file_of: dict[str, str] = {}
        self.n_files = self.n_bytes = 0
        self.writes = rank_zero_only.rank == 0  # type: ignore[attr-defined]

    def add(self, name: str, value: Tensor) -> None:
        """Add a whole tensor, which may be freed afterwards."""
        if self.writes:
            self.held[name] = value.detach().cpu().clone()
            if sum(one.nbytes for one in self.held.values()) >= self.shard_bytes:
                self._flush()

    def close(self) -> None:
        """Write the remaining tensors and the index."""
        if not self.writes:
            return
        self._flush()
        index = {"metadata": {"total_size": self.n_bytes}, "weight_map": self.file_of}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.directory / "model.safetensors.index.json").write_text(text)

    def _flush(self) -> None:
        """Write the collected tensors to the next file."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.n_files += 1
        file = f"model-{self.n_files:05d}.safetensors"
        save_file(self.held, self.directory / file, metadata={"format": "pt"})
        self.file_of |= dict.fromkeys(self.held, file)
        self.n_bytes += sum(one.nbytes for one in self.held.values())
        self.held = {}
