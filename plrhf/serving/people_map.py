"""Where people are among the train users of a model: a map in two dimensions, and words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch import Tensor

N_NEAREST, N_AGREEING = 7, 3
"""Train users that are asked for words, and how many must share them."""


class PeopleMap:
    """The first two principal components of the train users' vectors.

    Args:
        vectors: of the train users, [n, D], n from 1. generic: the generic user's, [D].
        words: of each train user, or None.
    """

    def __init__(self, vectors: Tensor, generic: Tensor, words: Sequence[str | None]) -> None:
        self.vectors = vectors.double().cpu().numpy()
        self.centre = self.vectors.mean(axis=0)
        apart = np.linalg.svd(self.vectors - self.centre, full_matrices=False)[2][:2]
        self.axes = np.pad(apart, ((0, 2 - len(apart)), (0, 0)))  # [2, D]
        self.generic = self.place(generic)
        self.words = list(words)

    def place(self, vector: Tensor) -> list[float]:
        """Return where a vector [D] is on the map."""
        found = self.axes @ (vector.double().cpu().numpy() - self.centre)
        return [round(float(one), 5) for one in found]

    def shown(self) -> dict[str, object]:
        """Return the map without names: places of people, what is said of them, and its size."""
        places = (self.vectors - self.centre) @ self.axes.T  # [n, 2]
        size = float(np.abs([*places.tolist(), self.generic]).max()) or 1.0
        people = places.round(5).tolist()
        return {"people": people, "words": self.words, "generic": self.generic, "size": size}

    def traits(self, vector: Tensor) -> list[str]:
        """Return the words that several of the train users nearest to a vector share."""
        away = np.linalg.norm(self.vectors - vector.double().cpu().numpy(), axis=1)
        nearest = [self.words[n] for n in np.argsort(away)[:N_NEAREST]]
        counts = Counter(words for words in nearest if words is not None)
        return [words for words, count in counts.most_common(2) if count >= N_AGREEING]
