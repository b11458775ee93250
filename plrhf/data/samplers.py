"""The order of train batches, which can be resumed in the middle, and the loaders that follow it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from plrhf.core.types import PreferenceBatch
from plrhf.data.dataset import PairDataset, RankShard
from plrhf.data.store import Indices

BUCKET_SPREAD = 0.1
"""How much shorter than the longest pair of its length bucket a pair may be, as a fraction."""


class BatchIndices(NamedTuple):
    """Indices of a batch's pairs, and the weight of its mean loss in the optimiser step."""

    indices: list[int]
    step_weight: float = 1.0


class ResumableBatchSampler(Sampler[BatchIndices]):
    """Draws train batches in an order fixed by seed and epoch alone, from any batch on.

    With `batch_tokens` pairs are divided once into buckets of like length. Every epoch draws the
    batches of a bucket at random and mixes the batches of all buckets, so that all epochs have the
    same number of batches.

    A batch of n pairs has the step weight k n / sum n, over the k batches whose gradients are summed
    to one optimiser step. Weighted so, the mean of their k losses is the mean over the step's pairs.

    Args:
        lengths: tokens of every pair's rows, [N, R].
        batch_size: largest number of pairs in a batch.
        seed: any integer.
        batch_tokens: largest number of tokens in a batch, padding included; a longer pair is a batch
            of its own. None: no limit, and pairs in random order.
        accumulated_batches: see `RankShard`.

    Attributes:
        served: batches drawn since training began. It alone says where to go on, because Lightning
            neither exhausts the iterator nor tells a batch sampler the epoch.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        *,
        batch_size: int,
        seed: int,
        batch_tokens: int | None = None,
        accumulated_batches: int = 1,
    ) -> None:
        self.lengths, self.seed = lengths, seed
        self.accumulated_batches = accumulated_batches
        self.longest = lengths.max(axis=1)
        self.bucket, sizes = np.zeros(len(lengths), dtype=np.int32), [batch_size]
        if batch_tokens is not None:
            row_tokens = batch_tokens // lengths.shape[1]
            self.bucket, sizes = length_buckets(self.longest, batch_size, row_tokens)
        # Batches as slices of the pairs sorted by bucket.
        starts, end = [], 0
        for size, n_pairs in zip(sizes, np.bincount(self.bucket, minlength=1), strict=True):
            starts.append(np.arange(end, end + n_pairs, size))
            end += int(n_pairs)
        self.starts = np.concatenate(starts)
        self.ends = np.append(self.starts[1:], end)
        self.served = 0

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[BatchIndices]:
        epoch, first = divmod(self.served, max(1, len(self)))
        pairs, batches = self.epoch_order(epoch)
        sizes = (self.ends - self.starts)[batches]
        step_starts = np.arange(0, len(sizes), self.accumulated_batches)
        step_sizes = np.add.reduceat(sizes, step_starts)  # pairs of each optimiser step
        for turn in range(first, len(self)):
            self.served += 1
            indices = pairs[self.starts[batches[turn]] : self.ends[batches[turn]]].tolist()
            step_size = int(step_sizes[turn // self.accumulated_batches])
            yield BatchIndices(indices, self.accumulated_batches * len(indices) / step_size)

    def epoch_order(self, epoch: int) -> tuple[Indices, Indices]:
        """Return the pairs shuffled and sorted by bucket, [N], and the order of the batches."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        pairs = torch.randperm(len(self.lengths), generator=generator).numpy()
        if self.bucket.max(initial=0) == 0:
            return pairs, np.arange(len(self))
        pairs = pairs[np.argsort(self.bucket[pairs], kind="stable")]
        return pairs, torch.randperm(len(self), generator=generator).numpy()

    def padding(self) -> float | None:
        """Return the fraction of padding among the tokens of the first epoch, None without pairs."""
        if len(self.lengths) == 0:
            return None
        pairs, _ = self.epoch_order(0)
        longest = np.maximum.reduceat(self.longest[pairs], self.starts)
        padded = self.lengths.shape[1] * (longest * (self.ends - self.starts)).sum()
        return 1 - float(self.lengths.sum() / padded)


def length_buckets(
    lengths: NDArray[np.int64], batch_size: int, row_tokens: int
) -> tuple[NDArray[np.int32], list[int]]:
    """Divide pairs into buckets of like length, the longest first.

    A bucket holds the pairs that are at most `BUCKET_SPREAD` shorter than its longest, and at least
    enough pairs for one batch.

    Args:
        lengths: tokens of every pair's longest row, [N].
        row_tokens: tokens that one row a pair of a batch may have in all.

    Returns:
        Each pair's bucket, [N], and each bucket's batch size.
    """
    order = np.argsort(-lengths, kind="stable")
    negative_lengths = -lengths[order]  # ascending, as searchsorted needs
    bucket = np.zeros(len(lengths), dtype=np.int32)
    sizes: list[int] = []
    start = 0
    while start < len(lengths):
        longest = -int(negative_lengths[start])
        size = max(1, min(batch_size, row_tokens // longest))
        shortest = (1 - BUCKET_SPREAD) * longest
        alike = int(np.searchsorted(negative_lengths, -shortest, side="right"))
        end = max(alike, start + size)
        bucket[order[start:end]] = len(sizes)
        sizes.append(size)
        start = end
    return bucket, sizes if len(sizes) > 0 else [batch_size]


class ShardedBatches(Dataset[PreferenceBatch]):
    """A dataset whose item is one rank's shard of a whole batch."""

    def __init__(self, pairs: PairDataset, shard: RankShard) -> None:
        self.pairs, self.shard = pairs, shard

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, batch: BatchIndices) -> PreferenceBatch:
        shard = self.pairs.shard(batch.indices, self.shard)
        return replace(shard, step_weight=batch.step_weight)


class ResumableLoader(DataLoader):
    """A loader whose position Lightning saves in checkpoints and restores."""

    def state_dict(self) -> dict[str, int]:
        """Return how many batches have been served."""
        sampler: Any = self.sampler
        return {"served": sampler.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after that many batches."""
        sampler: Any = self.sampler
        sampler.served = state["served"]
