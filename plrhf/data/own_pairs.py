"""Draws other train pairs of the same user for each pair, for encoders that read pairs (not ids)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plrhf.core.errors import bad_value
from plrhf.core.types import UserBatch, UserContext
from plrhf.data.dataset import PairDataset, TextValues
from plrhf.data.rows import Row
from plrhf.data.store import Indices

SPARE_CANDIDATES = 16
"""Number of a user's pairs considered in a draw, beyond twice the number drawn."""

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class TrainPairs:
    """The train pairs of every user, from which some are drawn for each pair.

    A draw depends only on the seed, the epoch and the pair, not on the batch or the process. It never
    includes the pair itself, or one with the same prompt and a response in common, since these would
    reveal the answer.

    Args:
        rows: the train rows. user_id: user index of each row, from 1, [N].
        least, most: range of the number of pairs drawn, which is uniformly distributed.
    """

    def __init__(
        self, rows: Sequence[Row], user_id: Indices, *, least: int, most: int, seed: int
    ) -> None:
        if least > most:
            allowed = f"at most encoder.max_pairs={most}"
            raise bad_value("encoder.min_pairs", least, allowed, f"Set encoder.min_pairs={most}")
        self.least, self.most, self.seed = least, most, seed
        self.texts = text_keys(rows)
        # Of each user the pairs stand together, in an order drawn once.
        self.order = np.lexsort((hash_integers(seed, np.arange(len(rows))), user_id))
        self.counts = np.append(np.bincount(user_id, minlength=1), 0)  # the last: of anybody else
        self.counts[0] = 0  # nobody's
        self.starts = np.cumsum(self.counts) - self.counts

    def draw(
        self, users: Indices, pairs: Indices, texts: NDArray[np.int64], *, epoch: int
    ) -> tuple[Indices, NDArray[np.bool_]]:
        """Draw pairs for train pairs, anew in each epoch.

        Args:
            users, pairs: index of the user and of the pair, [B]. texts: `text_keys` of the pairs.

        Returns:
            Indices of train pairs, [B, k], and which of them are drawn, [B, k] bool.
        """
        key = hash_integers(self.seed, epoch, pairs)
        places, possible = self._candidates(users, key)
        possible &= ~self._shares_text(places, texts)
        places, possible = self._sample(places, possible, key)
        number = self.least + hash_integers(key, 1) % (self.most - self.least + 1)
        return places, possible & (np.arange(places.shape[1]) < number[:, None])

    def draw_fixed(self, users: Indices) -> tuple[Indices, NDArray[np.bool_]]:
        """Draw `most` pairs of each user, always the same ones, for use outside training."""
        key = hash_integers(self.seed, users)
        return self._sample(*self._candidates(users, key), key)

    def draw_fixed_except(
        self, users: Indices, texts: NDArray[np.int64]
    ) -> tuple[Indices, NDArray[np.bool_]]:
        """Do as `draw_fixed`, but exclude pairs that share prompt and response with the pair asked.

        Args:
            texts: `text_keys` of the pairs asked.
        """
        places, possible = self.draw_fixed(users)
        return places, possible & ~self._shares_text(places, texts)

    def _candidates(
        self, users: Indices, key: NDArray[np.int64]
    ) -> tuple[Indices, NDArray[np.bool_]]:
        """Return a window [B, W] of each user's pairs that starts where the key says, and which exist."""
        users = np.minimum(users, len(self.counts) - 1)
        counts = self.counts[users]
        width = min(2 * self.most + SPARE_CANDIDATES, max(1, int(counts.max(initial=0))))
        slots = np.arange(width)
        offset = (hash_integers(key, 2)[:, None] + slots) % np.maximum(counts, 1)[:, None]
        at = np.minimum(self.starts[users][:, None] + offset, len(self.order) - 1)
        return self.order[at], slots < counts[:, None]

    def _sample(
        self, places: Indices, possible: NDArray[np.bool_], key: NDArray[np.int64]
    ) -> tuple[Indices, NDArray[np.bool_]]:
        """Put the possible candidates in random order, and keep the first `most`."""
        rank = hash_integers(key[:, None], 3, places)
        rank[~possible] = np.iinfo(np.int64).max
        first = rank.argsort(axis=1)[:, : self.most]
        return np.take_along_axis(places, first, 1), np.take_along_axis(possible, first, 1)

    def _shares_text(self, places: Indices, texts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which pairs [B, W] share prompt and response with the pair of their row of `texts`."""
        theirs = self.texts[places][..., :, None]  # [B, W, 4, 1]
        shared: NDArray[np.bool_] = (theirs == texts[:, None, None, :]).any(axis=(2, 3))
        return shared


class ContextDraw:
    """Makes the `UserContext` of the pairs of a dataset from train pairs of their users.

    Args:
        train: the train pairs; its `context_hidden` must be set before the first batch.
        asked: the dataset, which may be `train` itself.
    """

    def __init__(self, pairs: TrainPairs, train: PairDataset, asked: PairDataset) -> None:
        self.pairs, self.train, self.asked = pairs, train, asked
        self.texts = pairs.texts if asked is train else text_keys(asked.rows)

    def context_of_pairs(self, indices: Sequence[int], *, epoch: int) -> UserContext:
        """Return the context of the pairs at these indices."""
        at = np.asarray(indices, dtype=np.int64)
        users = self.asked.user_id[at].numpy()
        if self.asked is self.train:
            return self._context(*self.pairs.draw(users, at, self.texts[at], epoch=epoch))
        return self._context(*self.pairs.draw_fixed_except(users, self.texts[at]))

    def context_of_users(self, user_id: Tensor) -> UserContext:
        """Return the context of users [B] themselves, outside training."""
        return self._context(*self.pairs.draw_fixed(user_id.cpu().numpy()))

    def train_users(self, batch_size: int) -> Iterator[UserBatch]:
        """Yield all train users in batches, with their context."""
        known = np.flatnonzero(self.pairs.counts)
        for start in range(0, len(known), batch_size):
            users = known[start : start + batch_size]
            some_pair = torch.from_numpy(self.pairs.order[self.pairs.starts[users]])
            user_id = torch.from_numpy(users)
            yield UserBatch(user_id, self.train.features[some_pair], self.context_of_users(user_id))

    def _context(self, places: Indices, present: NDArray[np.bool_]) -> UserContext:
        """Make the context of the drawn train pairs."""
        assert self.train.context_hidden is not None
        places = np.where(present, places, 0)
        return make_context(self.train.context_hidden, torch.from_numpy(places), present)


def make_context(values: TextValues, places: Tensor, present: Any) -> UserContext:
    """Make a context from the indices [B, k] of pairs; each distinct text is stored once."""
    of_pair = values.of_pair[places]  # [B, k, 2]
    used = torch.zeros(len(values.values), dtype=torch.bool)
    used[of_pair] = True
    number = used.cumsum(0) - 1
    return UserContext(
        hidden=values.values[used], texts=number[of_pair], present=torch.as_tensor(present)
    )


def draw_context(datasets: Mapping[str, PairDataset], *, least: int, most: int, seed: int) -> None:
    """Add contexts, drawn from the train pairs of the users, to the batches of all datasets.

    Args:
        datasets: by split, including "train". others: see `TrainPairs`.
    """
    train = datasets["train"]
    pairs = TrainPairs(train.rows, train.user_id.numpy(), least=least, most=most, seed=seed)
    for dataset in datasets.values():
        dataset.context = ContextDraw(pairs, train, dataset)


def text_keys(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Hash the texts (prompt, response) of rows, with the prompt's id and with its text, [N, 4].

    Rows that share a hash share a text. Hashes differ between processes.
    """
    keys = (
        hash((prompt, response))
        for row in rows
        for prompt in (("id", row.prompt_id), ("text", str(row.prompt)))
        for response in (row.chosen, row.rejected)
    )
    return np.fromiter(keys, np.int64, 4 * len(rows)).reshape(-1, 4)


def hash_integers(*numbers: Any) -> NDArray[np.int64]:
    """Hash integers to integers from 0 to 2^63 - 1, the same in every process; arguments are broadcast.

    It is the finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number
    generators").
    """
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = (state ^ np.asarray(number).astype(np.uint64)) + np.uint64(GOLDEN)
        for shift, factor in ((30, FIRST), (27, SECOND)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(1)).astype(np.int64)
