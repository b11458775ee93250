"""Loads safetensors files into a sharded model: each process reads its own shards only.

transformers loads whole weights. Of it we use the rules that rename weights, that merge several weights
of the files into one (`conversion_mapping`), and that tie weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from plrhf.backbone.sharding import whole_shape, writable_part
from plrhf.core.errors import BadValue, bad_value

READ_AT_ONCE = 2**20  # numbers of a tensor, 4 MiB in float32


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor: a safetensors file and its name there."""

    file: Path
    name: str


@dataclass
class Sources:
    """Where in the files the weights of a model are.

    Attributes:
        plain: weights that are stored as they are, by their name in the model.
        converted: weights that are made from several stored ones, such as all experts of a layer, by
            the name of the first weight that the conversion makes.
    """

    plain: dict[str, StoredTensor] = field(default_factory=dict)
    converted: dict[str, WeightConverter] = field(default_factory=dict)


def fill_shards(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Read the weights at `path` into a sharded model, as `from_pretrained` does for a whole one.

    Weights that are stored as they are are read a few MiB at a time. A weight that is made from several
    stored ones is made whole on every process, one after the other, before its shard is taken.

    Args:
        model: sharded, with the shapes of its config and no values yet.
        path: a directory or hub name.

    Raises:
        ValueError: there are no safetensors files, or a weight is missing or has another shape.
    """
    sources = find_sources(model, _files_of(path))
    _tie_weights(model, sources)
    own = _tensors_of(model)
    missing = {name for name, _ in model.named_parameters()}
    for name, place in sources.plain.items():
        with writable_part(own[name]) as (part, first):
            _read_part(part, first, place, shape=whole_shape(own[name]))
        missing.discard(name)
    for first_name, converter in sources.converted.items():
        for name, value in _converted(model, first_name, converter).items():
            with writable_part(own[name]) as (part, first):
                part.copy_(value.reshape(-1)[first : first + len(part)])
            missing.discard(name)
    check_all_there(path, missing)
    return model.eval()


def check_all_there(path: str, missing: Iterable[str]) -> None:
    """Raise a ValueError if a model was read without some of its weights, which would then be random."""
    missing = sorted(name for name in missing if "pooler" not in name)  # which nothing here reads
    if len(missing) > 0:
        raise bad_value(
            "backbone.path",
            path,
            f"a model with all its weights (lacking {missing[0]})",
            "Save the model anew with save_pretrained",
        )


def find_sources(model: PreTrainedModel, files: list[Path]) -> Sources:
    """Find each weight of the model in the files, by transformers' renaming rules."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    own = _tensors_of(model)
    prefix: dict[str, Any] = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": own}
    found = Sources()
    # Their order decides which expert is the first one.
    for place in sorted(_tensors_in(files), key=lambda one: dot_natural_key(one.name)):
        name, pattern = rename_source_key(place.name, renamings, converters, **prefix)
        if name not in own and place.name in own:  # the rules are for an older form of the files
            name, pattern = rename_source_key(place.name, [], [], **prefix)
        if name not in own:
            continue
        if pattern is None:
            found.plain[name] = place
        else:
            converter = found.converted.setdefault(name, deepcopy(by_pattern[pattern]))
            read: Any = partial(_read_whole, place, own[name].dtype)
            converter.add_tensor(name, place.name, pattern, read)
    return found


def _tie_weights(model: PreTrainedModel, sources: Sources) -> None:
    """Tie weights as `from_pretrained` does: not if the files store both and they differ."""
    found = {*sources.plain, *sources.converted}
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in sources.plain and source in sources.plain:
            if _same_in_files(sources.plain[target], sources.plain[source]):
                found.discard(target)
                del sources.plain[target]
            else:
                del model.all_tied_weights_keys[target]
    missing = {name for name in _tensors_of(model) if name not in found}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


def _converted(
    model: PreTrainedModel, first_name: str, converter: WeightConverter
) -> Mapping[str, Tensor]:
    """Return the weights, by name, that a converter makes from the tensors it has collected."""
    own = _tensors_of(model)
    made = converter.convert(first_name, model=model, config=model.config)
    values = {name: one[0] if isinstance(one, list) else one for name, one in made.items()}
    for name, value in values.items():
        if value.shape != whole_shape(own[name]):
            raise _wrong_shape(f"backbone.path {name}", list(value.shape), whole_shape(own[name]))
    return values


def _files_of(path: str) -> list[Path]:
    """Return the safetensors files at a directory or hub name."""
    folder = Path(path)
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(path, allow_patterns=patterns))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [folder / name for name in names]
    return [one for one in (folder / "model.safetensors",) if one.is_file()]


def _tensors_in(files: list[Path]) -> list[StoredTensor]:
    """Return all tensors in the files."""
    found = []
    for file in files:
        with safe_open(file, "pt") as weights:
            found += [StoredTensor(file, name) for name in list(weights.keys())]
    return found


def _tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return parameters and saved buffers by name; a tied weight appears under each of its names."""
    every = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    return {name: every[name] for name in model.state_dict() if name in every}


def _read_part(part: Tensor, first: int, place: StoredTensor, *, shape: torch.Size) -> None:
    """Read the numbers of a stored tensor from index `first` on into `part` [n], piece by piece.

    Args:
        shape: expected shape of the whole tensor.
    """
    for start in range(0, len(part), READ_AT_ONCE):
        piece = part[start : start + READ_AT_ONCE]
        begin, end = first + start, first + start + len(piece)
        with safe_open(place.file, "pt") as weights:  # opened anew: its pages go with each piece
            found = weights.get_slice(place.name)
            if tuple(found.get_shape()) != tuple(shape):
                raise _wrong_shape(f"{place.file.name} {place.name}", found.get_shape(), shape)
            if len(shape) == 0:
                piece.copy_(weights.get_tensor(place.name).reshape(-1))
                continue
            width = shape[1:].numel()  # numbers a row
            rows = found[begin // width : -(-end // width)].reshape(-1)
            skipped = begin - begin // width * width
            piece.copy_(rows[skipped : skipped + len(piece)])


def _read_whole(place: StoredTensor, dtype: torch.dtype) -> Tensor:
    """Read a stored tensor and convert it to `dtype`."""
    with safe_open(place.file, "pt") as weights:
        return weights.get_tensor(place.name).to(dtype)


def _same_in_files(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two stored tensors are equal; they are compared piece by piece."""
    with safe_open(one.file, "pt") as first, safe_open(other.file, "pt") as second:
        left, right = first.get_slice(one.name), second.get_slice(other.name)
        shape = left.get_shape()
        if shape != right.get_shape():
            return False
        step = max(1, READ_AT_ONCE // max(1, torch.Size(shape[1:]).numel()))
        rows = range(0, shape[0], step)
        return all(torch.equal(left[at : at + step], right[at : at + step]) for at in rows)


def _wrong_shape(field_name: str, found: Any, shape: torch.Size) -> BadValue:
    allowed = f"shape {list(shape)}, as config.json says"
    return bad_value(field_name, found, allowed, "Save the model anew with save_pretrained")
