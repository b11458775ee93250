"""Weights of safetensors files put into a sharded model, by each process those of its own shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from plrhf.backbone.sharding import own_part, whole_shape
from plrhf.core.errors import bad_value

READ_AT_ONCE = 2**20  # numbers of a tensor, 4 MiB in float32


def fill_shards(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Put the weights at `path` into a sharded model: each process reads its shards, and no more.

    Raises:
        ValueError: no safetensors files there, or some that lack weights of the model or have others.
    """
    folder = Path(path)
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(path, allow_patterns=patterns))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [one.name for one in (folder / "model.safetensors",) if one.is_file()]
    own = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    missing = {name for name, _ in model.named_parameters()}
    for file in (folder / name for name in names):
        with safe_open(file, "pt") as weights:
            in_file = list(weights.keys())
        for name in in_file:
            known = (name, f"{model.base_model_prefix}.{name}")
            found = next((one for one in known if one in own), None)
            if found is not None:
                with own_part(own[found]) as (part, first):
                    _read_part(part, first, file, name, shape=whole_shape(own[found]))
                missing.discard(found)
    if len(missing) > 0:
        raise bad_value(
            "backbone.path",
            path,
            f"safetensors files with all weights (lacking {sorted(missing)[0]})",
            "Save the model anew with save_pretrained",
        )
    return model.eval()


def _read_part(part: Tensor, first: int, file: Path, name: str, *, shape: torch.Size) -> None:
    """Read numbers `first` and on of a tensor in a file into `part`, [n], a piece at a time."""
    for start in range(0, len(part), READ_AT_ONCE):
        piece = part[start : start + READ_AT_ONCE]
        begin, end = first + start, first + start + len(piece)
        with safe_open(file, "pt") as weights:  # anew: its pages go with each piece
            found = weights.get_slice(name)
            if tuple(found.get_shape()) != tuple(shape):
                raise bad_value(
                    f"{file.name} {name}",
                    found.get_shape(),
                    f"shape {list(shape)}, as config.json says",
                    "Save the model anew with save_pretrained",
                )
            width = shape[1:].numel()  # numbers a row
            rows = found[begin // width : -(-end // width)].reshape(-1)
            skipped = begin - begin // width * width
            piece.copy_(rows[skipped : skipped + len(piece)])
