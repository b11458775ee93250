"""What stands for a text in a control: its length, shape, style or id, and not the trunk's output."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from copy import copy
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from plrhf.core.errors import bad_value
from plrhf.data.dataset import PairDataset, TextValues
from plrhf.data.module import PreferenceData
from plrhf.data.rows import Row
from plrhf.data.sources.simulated import SimulatedSource

FeatureKind = Literal["text", "length", "shape", "style", "item"]

REPEATED = 5.0
"""How often an item must be compared on average for its id to say anything of it."""

CHARACTER_KINDS = ("Lu", "Ll", "Nd", "Ps", "Pe", "Po", "Pd", "Zs", "other")
"""Kinds of a text's first and last character: Unicode categories."""


def length_features(text: str) -> list[float]:
    """Return the logarithms of a text's characters and words."""
    return [float(np.log1p(len(text))), float(np.log1p(len(text.split())))]


def shape_features(text: str) -> list[float]:
    """Return all that is left of a text whose words are hidden: length, first and last character's kind."""
    kinds = []
    for character in (text[:1], text[-1:]):
        kind = unicodedata.category(character) if character else "other"
        kind = kind if kind in CHARACTER_KINDS else "other"
        kinds += [float(kind == one) for one in CHARACTER_KINDS]
    return [*length_features(text), *kinds]


def items(row: Row) -> tuple[str, str]:
    """Return what names the two responses of a pair: their ids, or else the texts themselves."""
    return row.chosen_id or row.chosen, row.rejected_id or row.rejected


def uses_per_item(rows: Sequence[Row]) -> float:
    """Return how often a response is compared on average."""
    named = [name for row in rows for name in items(row)]
    return len(named) / max(1, len(set(named)))


def with_features(data: PreferenceData, kind: FeatureKind) -> PreferenceData:
    """Return a copy of tokenised data whose texts are vectors of another kind than the backbone's.

    ``length`` and ``shape`` are standardised over the train texts, and so is ``style``, which is what
    simulated people judge texts by. ``item`` is one column a response that train rows have, so that a
    user model on it is a matrix factorisation on ids; a response that train has not seen is the zero
    vector.

    Raises:
        ValueError: ids of responses that hardly ever repeat, or style where people are not simulated.
    """
    if kind == "text":
        return data
    changed = copy(data)
    train = data.datasets["train"].rows
    if kind == "item":
        uses = uses_per_item(train)
        if uses < REPEATED:
            raise bad_value(
                "referee.features",
                kind,
                f"rows whose responses are compared {REPEATED:g} times each (here {uses:.1f})",
                "Leave the method out for these rows",
            )
        encode = _one_hot(sorted({name for row in train for name in items(row)}))
    else:
        texts = sorted({text for row in train for text in (row.chosen, row.rejected)})
        encode = _standardised(_measure(kind, data), texts)
    changed.datasets = {}
    for split, dataset in data.datasets.items():
        changed.datasets[split] = dataset_with(dataset, kind, encode)
    return changed


def _measure(kind: FeatureKind, data: PreferenceData) -> Callable[[str], list[float]]:
    """Return the function that computes the features of a text, of a kind that is standardised."""
    if kind == "style":
        source = data.source
        if not isinstance(source, SimulatedSource):
            allowed = "length or shape for rows of real people"
            raise bad_value(
                "referee.features", kind, allowed, "Leave the method out for these rows"
            )
        return lambda text: source.style(text).tolist()
    return length_features if kind == "length" else shape_features


def dataset_with(
    dataset: PairDataset, kind: FeatureKind, encode: Callable[[Sequence[str]], Tensor]
) -> PairDataset:
    """Return a copy of a dataset with the vectors that `encode` gives its responses."""
    changed = copy(dataset)
    pairs = [items(row) if kind == "item" else (row.chosen, row.rejected) for row in dataset.rows]
    number: dict[str, int] = {}
    for pair in pairs:
        for name in pair:
            number.setdefault(name, len(number))
    of_pair = torch.tensor([[number[name] for name in pair] for pair in pairs]).view(-1, 2)
    changed.hidden = TextValues(encode(list(number)), of_pair)
    return changed


def _one_hot(known: Sequence[str]) -> Callable[[Sequence[str]], Tensor]:
    place = {name: at for at, name in enumerate(known)}

    def encode(names: Sequence[str]) -> Tensor:
        values = torch.zeros(len(names), len(known))
        for row, name in enumerate(names):
            if name in place:
                values[row, place[name]] = 1.0
        return values

    return encode


def _standardised(
    features: Callable[[str], list[float]], train: Sequence[str]
) -> Callable[[Sequence[str]], Tensor]:
    known = torch.tensor([features(text) for text in train])
    mean, spread = known.mean(dim=0), known.std(dim=0, unbiased=False)
    spread = torch.where(spread > 1e-6, spread, 1.0)
    return lambda texts: (torch.tensor([features(text) for text in texts]) - mean) / spread


class FixedFeatures(nn.Module):
    """Stands for a backbone where texts are vectors of a width already.

    Args:
        width: of the vectors.
    """

    trainable = "frozen"
    embedding_size = 1
    max_positions: int | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden_size = self.block_size = width
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.layout = "packed"

    def vocabulary(self) -> Tensor:
        """Return no embeddings, [1, 1]."""
        return torch.zeros(1, 1)

    def fingerprint(self) -> str:
        """Return what tells it from a language model."""
        return f"vectors of {self.hidden_size}"
