"""Other train pairs of the same user beside each pair, for encoders that read pairs and not ids."""

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
"""How many more train pairs of a user are looked at for a draw than twice those it may take."""

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class TrainPairs:
    """The train pairs of every user, from which some are drawn for each pair.

    A draw depends on the seed, the epoch and the pair alone: not on the batch, the process, or what was
    drawn before. It never takes the pair asked, nor one with the same prompt and a response in common,
    which would give the answer away.

    Args:
        rows: the train rows. user_id: of each, its index from 1, [N].
        least, most: how many pairs are drawn for a train pair; each number is as likely.
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
        self.order = np.lexsort((mixed(seed, np.arange(len(rows))), user_id))
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
            Places of train pairs, [B, k], and which of them are drawn, [B, k].
        """
        key = mixed(self.seed, epoch, pairs)
        places, possible = self._candidates(users, key)
        possible &= ~self._shares_text(places, texts)
        places, possible = self._first(places, possible, key)
        number = self.least + mixed(key, 1) % (self.most - self.least + 1)
        return places, possible & (np.arange(places.shape[1]) < number[:, None])

    def of_users(self, users: Indices) -> tuple[Indices, NDArray[np.bool_]]:
        """Draw the pairs that stand for users outside training, always the same: `most` of them."""
        key = mixed(self.seed, users)
        return self._first(*self._candidates(users, key), key)

    def beside(self, users: Indices, texts: NDArray[np.int64]) -> tuple[Indices, NDArray[np.bool_]]:
        """Draw as `of_users`, and leave out what shares prompt and response with the pair asked."""
        places, possible = self.of_users(users)
        return places, possible & ~self._shares_text(places, texts)

    def _candidates(
        self, users: Indices, key: NDArray[np.int64]
    ) -> tuple[Indices, NDArray[np.bool_]]:
        """Take a run of each user's pairs, which begins where the key says; [B, W]."""
        users = np.minimum(users, len(self.counts) - 1)
        counts = self.counts[users]
        width = min(2 * self.most + SPARE_CANDIDATES, max(1, int(counts.max(initial=0))))
        slots = np.arange(width)
        offset = (mixed(key, 2)[:, None] + slots) % np.maximum(counts, 1)[:, None]
        at = np.minimum(self.starts[users][:, None] + offset, len(self.order) - 1)
        return self.order[at], slots < counts[:, None]

    def _first(
        self, places: Indices, possible: NDArray[np.bool_], key: NDArray[np.int64]
    ) -> tuple[Indices, NDArray[np.bool_]]:
        """Put the possible candidates in random order, and keep the first `most`."""
        rank = mixed(key[:, None], 3, places)
        rank[~possible] = np.iinfo(np.int64).max
        first = rank.argsort(axis=1)[:, : self.most]
        return np.take_along_axis(places, first, 1), np.take_along_axis(possible, first, 1)

    def _shares_text(self, places: Indices, texts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which places [B, W] have a text in common with the pair of their row."""
        theirs = self.texts[places][..., :, None]  # [B, W, 4, 1]
        shared: NDArray[np.bool_] = (theirs == texts[:, None, None, :]).any(axis=(2, 3))
        return shared


class ContextDraw:
    """What stands beside each pair of a dataset: pairs of its user, and values of their texts.

    Args:
        train: the train pairs, whose `context_hidden` is known by the time of the first batch.
        asked: the dataset, which may be that of the train pairs.
    """

    def __init__(self, pairs: TrainPairs, train: PairDataset, asked: PairDataset) -> None:
        self.pairs, self.train, self.asked = pairs, train, asked
        self.texts = pairs.texts if asked is train else text_keys(asked.rows)

    def of_pairs(self, indices: Sequence[int], *, epoch: int) -> UserContext:
        """Draw what stands beside the pairs at these indices."""
        at = np.asarray(indices, dtype=np.int64)
        users = self.asked.user_id[at].numpy()
        if self.asked is self.train:
            return self._context(*self.pairs.draw(users, at, self.texts[at], epoch=epoch))
        return self._context(*self.pairs.beside(users, self.texts[at]))

    def of_users(self, user_id: Tensor) -> UserContext:
        """Draw what stands for users [B] where no pair is asked."""
        return self._context(*self.pairs.of_users(user_id.cpu().numpy()))

    def train_users(self, batch_size: int) -> Iterator[UserBatch]:
        """Yield all train users, each with the pairs that stand for them."""
        known = np.flatnonzero(self.pairs.counts)
        for start in range(0, len(known), batch_size):
            users = known[start : start + batch_size]
            some_pair = torch.from_numpy(self.pairs.order[self.pairs.starts[users]])
            user_id = torch.from_numpy(users)
            yield UserBatch(user_id, self.train.features[some_pair], self.of_users(user_id))

    def _context(self, places: Indices, present: NDArray[np.bool_]) -> UserContext:
        assert self.train.context_hidden is not None
        places = np.where(present, places, 0)
        return context_of(self.train.context_hidden, torch.from_numpy(places), present)


def context_of(values: TextValues, places: Tensor, present: Any) -> UserContext:
    """Look up the texts of pairs [B, k] and keep each distinct one once."""
    of_pair = values.of_pair[places]  # [B, k, 2]
    used = torch.zeros(len(values.values), dtype=torch.bool)
    used[of_pair] = True
    number = used.cumsum(0) - 1
    return UserContext(
        hidden=values.values[used], texts=number[of_pair], present=torch.as_tensor(present)
    )


def draw_context(datasets: Mapping[str, PairDataset], *, least: int, most: int, seed: int) -> None:
    """Let the batches of all datasets hold pairs of their users, which are train pairs.

    Args:
        datasets: by split, "train" among them. others: see `TrainPairs`.
    """
    train = datasets["train"]
    pairs = TrainPairs(train.rows, train.user_id.numpy(), least=least, most=most, seed=seed)
    for dataset in datasets.values():
        dataset.context = ContextDraw(pairs, train, dataset)


def text_keys(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Hash the (prompt, response) texts of rows, each by the prompt's id and by its text, [N, 4].

    The hashes are of this process alone; two rows share a text if they share a hash.
    """
    keys = (
        hash((prompt, response))
        for row in rows
        for prompt in (("id", row.prompt_id), ("text", str(row.prompt)))
        for response in (row.chosen, row.rejected)
    )
    return np.fromiter(keys, np.int64, 4 * len(rows)).reshape(-1, 4)


def mixed(*numbers: Any) -> NDArray[np.int64]:
    """Hash whole numbers to whole numbers from 0 to 2^63 - 1, alike in every process; they broadcast.

    The finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators").
    """
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = (state ^ np.asarray(number).astype(np.uint64)) + np.uint64(GOLDEN)
        for shift, factor in ((30, FIRST), (27, SECOND)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(1)).astype(np.int64)
