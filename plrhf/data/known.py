"""What was once computed for texts, on disk, where other runs on the same backbone find it again."""

from __future__ import annotations

import hashlib
import uuid
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from plrhf.data.store import appearing

Text = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of a response."""


class KnownTexts:
    """Values of texts, in files that are written once, whole, and never changed.

    Two processes at once at worst both compute a value; a damaged file is passed over, and its values
    computed anew.

    Args:
        folder: named by all that decides the values (weights, what is computed, precision).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = [_read(path) for path in sorted(folder.glob("*.safetensors"))]
        whole = [one for one in files if one is not None]
        self.keys = np.concatenate([np.empty(0, np.int64), *(keys for keys, _ in whole)])
        self.values = np.concatenate([values for _, values in whole]) if whole else None
        self.order = np.argsort(self.keys, kind="stable")

    def find(self, texts: Sequence[Text]) -> tuple[Tensor | None, list[int]]:
        """Values [N, ...] of the texts, zero where not known (None: none is), and places of those."""
        if self.values is None:
            return None, list(range(len(texts)))
        wanted = keys_of(texts)
        at = np.searchsorted(self.keys, wanted, sorter=self.order).clip(max=len(self.keys) - 1)
        found_at = self.order[at]
        is_known = self.keys[found_at] == wanted
        values = self.values[found_at]
        values[~is_known] = 0
        return torch.from_numpy(values), np.flatnonzero(~is_known).tolist()

    def add(self, texts: Sequence[Text], values: Tensor) -> None:
        """Keep the values [N, ...] of these texts for whoever comes next."""
        with appearing(self.folder / f"{uuid.uuid4().hex}.safetensors") as part:
            save_file({"keys": keys_of(texts), "values": values.float().numpy()}, part)


def keys_of(texts: Sequence[Text]) -> np.ndarray:
    """64 bits of a hash of each text, [N] int64: of 10 million, two coincide once in 400,000 tries."""
    digests = (
        hashlib.blake2b(array("i", [len(prompt), *prompt, *response]).tobytes(), digest_size=8)
        for prompt, response in texts
    )
    keys = (int.from_bytes(one.digest(), "little", signed=True) for one in digests)
    return np.fromiter(keys, np.int64, len(texts))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        content = load_file(path)
    except (OSError, SafetensorError):
        return None
    return content["keys"], content["values"]
