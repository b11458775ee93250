"""A cache on disk of values computed per text, such as reference log-probabilities."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from torch import Tensor

from plrhf.data.cache_files import cache_file, intact_files
from plrhf.data.digests import content_hash

TokenText = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of a response."""

COMPUTATION = 3
"""Version of the computation. Increase it when a code change gives other values; old files are then
ignored."""

LIBRARIES = ("torch", "transformers", "peft")
"""Libraries whose versions may affect the values."""

NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version"}
"""Entries of a config that say where it was found and do not affect the model's outputs."""


def text_values_key(
    *,
    weights: str,
    config: Mapping[str, object],
    attention: str | None,
    layout: str,
    precision: str,
    computed: Sequence[str],
) -> str:
    """Hash everything that decides the values of a text, so that no other model's values are used.

    Library versions and `COMPUTATION` are hashed too.

    Args:
        weights: a hash of every weight.
        config: of the model, as ``to_dict`` gives it; weights alone do not say what they are used for.
        attention: the implementation, which the config leaves out.
        layout: how pairs are put into rows.
        precision: of the computation.
        computed: what the values are, such as ``("pooled", "mean")``.
    """
    text = json.dumps(_canonical(config), sort_keys=True, default=str)
    versions = [f"{name} {version(name)}" for name in LIBRARIES]
    return content_hash(
        COMPUTATION, versions, weights, text, attention, layout, precision, list(computed)
    )


def _canonical(config: object) -> object:
    """Return a config, and the configs in it, without the entries `NOT_OF_THE_MODEL`."""
    if isinstance(config, Mapping):
        entries = {str(name): _canonical(value) for name, value in config.items()}
        return {name: entries[name] for name in entries.keys() - NOT_OF_THE_MODEL}
    if isinstance(config, list | tuple):
        return [_canonical(value) for value in config]
    return config


class KnownTextValues:
    """Values of texts that were computed before.

    Args:
        keys: of the texts, [M] int64, see `text_keys`. values: [M, ...] float32; None without any.
    """

    def __init__(self, keys: NDArray[np.int64], values: NDArray[np.float32] | None) -> None:
        self.keys, self.values = keys, values
        self.order = np.argsort(keys, kind="stable")

    def find(self, texts: Sequence[TokenText]) -> tuple[Tensor | None, list[int]]:
        """Look up the values of texts.

        Returns:
            The values [N, ...] float32, 0 for texts that are not in the cache (None if the cache is
            empty), and the indices of the texts that are not in it.
        """
        if self.values is None:
            return None, list(range(len(texts)))
        wanted = text_keys(texts)
        at = np.searchsorted(self.keys, wanted, sorter=self.order).clip(max=len(self.keys) - 1)
        found_at = self.order[at]
        is_found = self.keys[found_at] == wanted
        values = self.values[found_at]
        values[~is_found] = 0
        return torch.from_numpy(values), np.flatnonzero(~is_found).tolist()

    def add(self, texts: Sequence[TokenText], values: Tensor) -> None:
        """Hear of values [N, ...] that had to be computed; here they are not kept."""


class TextValueCache(KnownTextValues):
    """A folder of the values of texts, which all runs on the same backbone share.

    Every file is written once and never changed. Two processes that miss the same value at the same
    time both compute it. A damaged file is removed, and its values are computed anew.

    Args:
        folder: its name must hold all that decides the values, see `text_values_key`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = [load_file(path) for path in intact_files(folder, "values", ".safetensors")]
        super().__init__(
            np.concatenate([np.empty(0, np.int64), *(one["keys"] for one in files)]),
            np.concatenate([one["values"] for one in files]) if files else None,
        )

    def add(self, texts: Sequence[TokenText], values: Tensor) -> None:
        """Write the values [N, ...] of texts to a new file of the cache."""
        _write(self.folder, text_keys(texts), values.float().numpy())


def _write(folder: Path, keys: NDArray[np.int64], values: NDArray[np.float32]) -> None:
    """Write a new file with the values of texts."""
    with cache_file(folder, "values", ".safetensors") as part:
        # `save_file` would put a file of its own, which only the owner can read, in the place.
        part.write_bytes(save({"keys": keys, "values": values}))


def remove_texts(cache_dir: Path, keys: NDArray[np.int64]) -> Iterator[tuple[Path, int]]:
    """Remove the values of texts from all folders of a cache; yield each such file and their number."""
    for folder in sorted(cache_dir.glob("texts-*")):
        for path in intact_files(folder, "values", ".safetensors"):
            one = load_file(path)
            kept = ~np.isin(one["keys"], keys)
            if kept.all():
                continue
            if kept.any():
                _write(folder, one["keys"][kept], one["values"][kept])
            path.unlink(missing_ok=True)
            yield path, int((~kept).sum())


def text_keys(texts: Sequence[TokenText]) -> NDArray[np.int64]:
    """Hash each text to 64 bits, [N]. Ten million texts collide with a probability of 1 in 400,000."""
    digests = (
        hashlib.blake2b(array("i", [len(prompt), *prompt, *response]).tobytes(), digest_size=8)
        for prompt, response in texts
    )
    keys = (int.from_bytes(one.digest(), "little", signed=True) for one in digests)
    return np.fromiter(keys, np.int64, len(texts))
