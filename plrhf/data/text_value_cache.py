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
from torch import Tensor

from plrhf.data.cache_files import CachedArray, CachedArrays, cache_file, cached, made_anew
from plrhf.data.digests import content_hash
from plrhf.data.store import Indices

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
        keys: of the texts, [M] int64, see `text_keys`. values: [M, ...] float32.
    """

    def __init__(self, keys: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        self.parts = [_Part(keys, values)]

    def find(self, texts: Sequence[TokenText]) -> tuple[Tensor | None, list[int]]:
        """Look up the values of texts.

        Returns:
            The values [N, ...] float32, 0 for texts that are not in the cache (None if the cache is
            empty), and the indices of the texts that are not in it.
        """
        wanted, missing = text_keys(texts), np.arange(len(texts))
        values: NDArray[np.float32] | None = None
        for part in self.parts:
            is_there, rows = part.find(wanted[missing])
            with made_anew():
                known = part.values[rows]
                if values is None:
                    values = np.zeros((len(texts), *known.shape[1:]), np.float32)
                values[missing[is_there]] = known
                missing = missing[~is_there]
        return None if values is None else torch.from_numpy(values), missing.tolist()

    def add(self, texts: Sequence[TokenText], values: Tensor) -> None:
        """Hear of values [N, ...] that had to be computed; here they are not kept."""


class _Part:
    """The values of texts in one file, or in memory."""

    def __init__(self, keys: NDArray[np.int64], values: NDArray[np.float32] | CachedArray) -> None:
        self.keys, self.values = keys, values
        self._order = np.argsort(keys, kind="stable")

    def find(self, wanted: NDArray[np.int64]) -> tuple[NDArray[np.bool_], Indices]:
        """Return whether each key is here, [N] bool, and the rows of those that are."""
        at = np.searchsorted(self.keys, wanted, sorter=self._order).clip(max=len(self.keys) - 1)
        rows = self._order[at]
        is_there = self.keys[rows] == wanted
        return is_there, rows[is_there]


class TextValueCache(KnownTextValues):
    """A folder of the values of texts, which all runs on the same backbone share.

    Every file is written once and never changed. Two processes that miss the same value at the same
    time both compute it. A damaged file is removed, and its values are computed anew.

    Args:
        folder: its name must hold all that decides the values, see `text_values_key`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts = cached(folder, "values", lambda one: _Part(one["keys"][:], one["values"]))

    def add(self, texts: Sequence[TokenText], values: Tensor) -> None:
        """Write the values [N, ...] of texts to a new file of the cache."""
        _write(self.folder, text_keys(texts), values.float().numpy())


def _write(folder: Path, keys: NDArray[np.int64], values: NDArray[np.float32]) -> None:
    """Write a new file with the values of texts."""
    with cache_file(folder, "values") as file:
        file.add("keys", keys)
        file.add("values", values)


def remove_texts(cache_dir: Path, keys: NDArray[np.int64]) -> Iterator[tuple[Path, int]]:
    """Remove the values of texts from all folders of a cache; yield each such file and their number."""
    for folder in sorted(cache_dir.glob("texts-*")):
        for path, n_removed in cached(folder, "values", lambda file: _without(file, keys)):
            if n_removed > 0:
                yield path, n_removed


def _without(file: CachedArrays, keys: NDArray[np.int64]) -> tuple[Path, int]:
    """Write a file anew without the values of texts; return its former path, and their number."""
    of_file = file["keys"][:]
    kept = np.flatnonzero(~np.isin(of_file, keys))
    if len(kept) < len(of_file):
        if len(kept) > 0:
            _write(file.path.parent, of_file[kept], file["values"][kept])
        file.path.unlink(missing_ok=True)
    return file.path, len(of_file) - len(kept)


def text_keys(texts: Sequence[TokenText]) -> NDArray[np.int64]:
    """Hash each text to 64 bits, [N]. Ten million texts collide with a probability of 1 in 400,000."""
    digests = (
        hashlib.blake2b(array("i", [len(prompt), *prompt, *response]).tobytes(), digest_size=8)
        for prompt, response in texts
    )
    keys = (int.from_bytes(one.digest(), "little", signed=True) for one in digests)
    return np.fromiter(keys, np.int64, len(texts))
