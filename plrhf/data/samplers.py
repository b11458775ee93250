"""Samplers of train batches that can be resumed in the middle, and their loaders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from secrets import randbits
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from plrhf.core.errors import bad_value
from plrhf.core.types import PreferenceBatch
from plrhf.data.dataset import PairDataset, RankShard
from plrhf.data.groups import Groups, groups_of
from plrhf.data.store import Indices

BUCKET_SPREAD = 0.1
"""How much shorter than the longest pair of its length bucket a pair may be, as a fraction."""


class BatchIndices(NamedTuple):
    """Indices of a batch's pairs, the weight of its mean loss in the optimiser step, and the epoch."""

    indices: list[int]
    step_weight: float = 1.0
    epoch: int = 0


class ResumableBatchSampler(Sampler[BatchIndices]):
    """Draws train batches in an order that depends on seed and epoch only, starting at any batch.

    A batch of n pairs has the step weight k n / sum n, over the k batches whose gradients are summed to
    one optimiser step. The mean of their k weighted losses is then the mean over the step's pairs.

    Args:
        lengths: number of tokens of each pair's rows, [N, R].
        seed: any integer.
        accumulated_batches: see `RankShard`.

    Attributes:
        served: number of batches drawn since training began. It alone says where to resume, because
            Lightning neither exhausts the iterator nor tells a batch sampler the epoch.
    """

    def __init__(
        self, lengths: NDArray[np.int64], *, seed: int, accumulated_batches: int = 1
    ) -> None:
        self.lengths, self.seed = lengths, seed
        self.accumulated_batches = accumulated_batches
        self.served = 0

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches in an epoch, the same in all epochs."""

    @abstractmethod
    def batches(self, generator: torch.Generator) -> list[Indices]:
        """Draw the pairs of each batch of an epoch."""

    def epoch(self, number: int) -> list[Indices]:
        """Return the pairs of each batch of an epoch, in its order."""
        return self.batches(torch.Generator().manual_seed(self.seed * 1_000_003 + number))

    def __iter__(self) -> Iterator[BatchIndices]:
        epoch, first = divmod(self.served, max(1, len(self)))
        batches = self.epoch(epoch)
        sizes = np.array([len(one) for one in batches], dtype=np.int64)
        step_starts = np.arange(0, len(sizes), self.accumulated_batches)
        step_sizes = np.add.reduceat(sizes, step_starts)  # pairs of each optimiser step
        for turn in range(first, len(batches)):
            self.served += 1
            step_size = int(step_sizes[turn // self.accumulated_batches])
            weight = self.accumulated_batches * int(sizes[turn]) / step_size if step_size else 1.0
            yield BatchIndices(batches[turn].tolist(), weight, epoch)

    def padding(self) -> float | None:
        """Return the fraction of padding among the tokens of the first epoch; None without pairs."""
        if len(self.lengths) == 0:
            return None
        longest = self.lengths.max(axis=1)
        padded = sum(int(longest[one].max()) * len(one) for one in self.epoch(0))
        return 1 - float(self.lengths.sum() / (self.lengths.shape[1] * padded))


class PairSampler(ResumableBatchSampler):
    """Draws pairs at random, regardless of their users.

    With `batch_tokens`, pairs are first divided into buckets of similar length. In every epoch, batches
    are drawn at random within buckets, and the batches of all buckets are shuffled, so all epochs have
    the same number of batches.

    Args:
        batch_size: largest number of pairs in a batch.
        batch_tokens: largest number of tokens in a batch, padding included; a longer pair is a batch of
            its own. None: no limit and no buckets.
        others: see `ResumableBatchSampler`.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        *,
        batch_size: int,
        batch_tokens: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(lengths, **others)
        self.bucket, sizes = np.zeros(len(lengths), dtype=np.int32), [batch_size]
        if batch_tokens is not None:
            row_tokens = batch_tokens // lengths.shape[1]
            self.bucket, sizes = length_buckets(lengths.max(axis=1), batch_size, row_tokens)
        # Batches as slices of the pairs sorted by bucket.
        starts, end = [], 0
        for size, n_pairs in zip(sizes, np.bincount(self.bucket, minlength=1), strict=True):
            starts.append(np.arange(end, end + n_pairs, size))
            end += int(n_pairs)
        self.starts = np.concatenate(starts)

    def __len__(self) -> int:
        return len(self.starts)

    def batches(self, generator: torch.Generator) -> list[Indices]:
        pairs = torch.randperm(len(self.lengths), generator=generator).numpy()
        order = np.arange(len(self))
        if self.bucket.max(initial=0) > 0:
            pairs = pairs[np.argsort(self.bucket[pairs], kind="stable")]
            order = torch.randperm(len(self), generator=generator).numpy()
        slices = np.split(pairs, self.starts[1:])
        return [slices[place] for place in order]


class UserSampler(ResumableBatchSampler):
    """Draws users at random, with several pairs of each: a batch is a few tasks.

    A user's pairs are divided at random into parts of `pairs_per_user`; the last one is smaller. An
    epoch has rounds. In each round every user who has parts left gives one, in random order, and
    `users_per_batch` of them are a batch. So each user is in a batch at most once.

    Args:
        user_id: user of each pair, [N]. others: see `ResumableBatchSampler`.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        user_id: NDArray[np.int64],
        *,
        users_per_batch: int,
        pairs_per_user: int,
        **others: Any,
    ) -> None:
        super().__init__(lengths, **others)
        self.user_id = user_id
        self.users_per_batch, self.pairs_per_user = users_per_batch, pairs_per_user

    def __len__(self) -> int:
        _, counts = np.unique(self.user_id, return_counts=True)
        parts = -(-counts // self.pairs_per_user)
        users = [int((parts > turn).sum()) for turn in range(int(parts.max(initial=0)))]
        return sum(-(-one // self.users_per_batch) for one in users)

    def batches(self, generator: torch.Generator) -> list[Indices]:
        pairs = torch.randperm(len(self.user_id), generator=generator).numpy()
        pairs = pairs[np.argsort(self.user_id[pairs], kind="stable")]
        _, starts = np.unique(self.user_id[pairs], return_index=True)
        of_users = np.split(pairs, starts[1:]) if len(pairs) > 0 else []
        size, found = self.pairs_per_user, []
        for start in range(0, max(map(len, of_users), default=0), size):
            parts = [one[start : start + size] for one in of_users if len(one) > start]
            order = torch.randperm(len(parts), generator=generator).tolist()
            for first in range(0, len(order), self.users_per_batch):
                taken = order[first : first + self.users_per_batch]
                found.append(np.concatenate([parts[place] for place in taken]))
        return found


class PoissonUserSampler(ResumableBatchSampler):
    """Draws each user into each batch by chance, on their own, with several pairs of each.

    A batch has `users_per_batch` users on average and may have none. Accountants of differential privacy
    assume this (Poisson sampling). An epoch has so many batches that a user is drawn once on average.

    Args:
        user_id: user of each pair, [N]. pairs_per_user: at most, drawn at random. others: see
            `ResumableBatchSampler`.

    Attributes:
        sample_rate: probability with which a batch has a user.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        user_id: NDArray[np.int64],
        *,
        users_per_batch: int,
        pairs_per_user: int,
        **others: Any,
    ) -> None:
        super().__init__(lengths, **others)
        _, starts = np.unique(np.sort(user_id), return_index=True)
        self.of_users = np.split(np.argsort(user_id, kind="stable"), starts[1:])
        self.pairs_per_user = pairs_per_user
        self.sample_rate = users_per_batch / len(self.of_users)
        if self.sample_rate > 1:
            allowed = f"at most the {len(self.of_users)} users of train rows"
            cure = f"Set data.users_per_batch={max(1, len(self.of_users) // 4)}"
            raise bad_value("data.users_per_batch", users_per_batch, allowed, cure)

    def __len__(self) -> int:
        return round(1 / self.sample_rate)

    def batches(self, generator: torch.Generator) -> list[Indices]:
        return [self._batch(generator) for _ in range(len(self))]

    def _batch(self, generator: torch.Generator) -> Indices:
        drawn = torch.rand(len(self.of_users), generator=generator) < self.sample_rate
        found = [np.empty(0, dtype=np.int64)]
        for user in drawn.nonzero().flatten().tolist():
            own = self.of_users[user]
            places = torch.randperm(len(own), generator=generator)[: self.pairs_per_user]
            found.append(own[places.numpy()])
        return np.concatenate(found)

    def padding(self) -> None:
        """Return None: an epoch does not have each pair once."""


class GroupSampler(ResumableBatchSampler):
    """Draws groups of pairs at random, each as a whole.

    Batches have equally many groups, as many as give `batch_size` pairs on average.

    Args:
        groups: of the pairs. others: see `ResumableBatchSampler`.
    """

    def __init__(
        self, lengths: NDArray[np.int64], groups: Groups, *, batch_size: int, **others: Any
    ) -> None:
        super().__init__(lengths, **others)
        self.groups = groups
        self.groups_per_batch = max(1, round(batch_size * len(groups) / max(1, len(lengths))))

    def __len__(self) -> int:
        return -(-len(self.groups) // self.groups_per_batch)

    def batches(self, generator: torch.Generator) -> list[Indices]:
        order = torch.randperm(len(self.groups), generator=generator).numpy()
        size = self.groups_per_batch
        return [self.groups.pairs(order[at : at + size]) for at in range(0, len(order), size)]


def make_sampler(
    dataset: PairDataset,
    *,
    batch_size: int,
    batch_tokens: int | None,
    users_per_batch: int | None,
    secret: bool = False,
    **others: Any,
) -> ResumableBatchSampler:
    """Make the sampler of train batches.

    It is a `GroupSampler` if pairs have groups, a `UserSampler` if `users_per_batch` is set, else a
    `PairSampler`. With `batch_tokens` or `users_per_batch`, turns of a conversation are drawn apart.

    Args:
        secret: draw users independently, from a seed that nobody knows (`PoissonUserSampler`).

    Raises:
        ValueError: users or groups are drawn together with a limit of tokens, groups with users, or there
            are more users than pairs.
    """
    lengths = dataset.row_lengths()
    given = {"batch_tokens": batch_tokens, "users_per_batch": users_per_batch}
    name, value = next(((one, of) for one, of in given.items() if of is not None), ("", None))
    if dataset.groups is not None and value is None:
        return GroupSampler(lengths, dataset.groups, batch_size=batch_size, **others)
    if dataset.groups is not None and groups_of(dataset.rows, conversations=False) is not None:
        allowed = "null where rows have a group_id, as those of rankings"
        raise bad_value(f"data.{name}", value, allowed, f"Set data.{name}=null")
    if users_per_batch is None:
        return PairSampler(lengths, batch_size=batch_size, batch_tokens=batch_tokens, **others)
    if batch_tokens is not None or users_per_batch > batch_size:
        raise bad_value(
            "data.users_per_batch",
            users_per_batch,
            f"null with data.batch_tokens, else at most data.batch_size={batch_size}",
            "Set data.users_per_batch=null, or data.batch_tokens=null and a larger data.batch_size",
        )
    sizes = {"users_per_batch": users_per_batch, "pairs_per_user": batch_size // users_per_batch}
    user_id = dataset.user_id.numpy()
    if secret:
        return PoissonUserSampler(lengths, user_id, **sizes, **{**others, "seed": randbits(43)})
    return UserSampler(lengths, user_id, **sizes, **others)


def length_buckets(
    lengths: NDArray[np.int64], batch_size: int, row_tokens: int
) -> tuple[NDArray[np.int32], list[int]]:
    """Divide pairs into buckets of similar length, the longest first.

    The pairs of a bucket are at most `BUCKET_SPREAD` shorter than its longest, and at least enough for
    one batch.

    Args:
        lengths: number of tokens of each pair's longest row, [N].
        row_tokens: total number of tokens in a batch, counting one row a pair.

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
    """A dataset whose items are one rank's shards of whole batches."""

    def __init__(self, pairs: PairDataset, shard: RankShard) -> None:
        self.pairs, self.shard = pairs, shard

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, batch: BatchIndices) -> PreferenceBatch:
        shard = self.pairs.shard(batch.indices, self.shard, epoch=batch.epoch)
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
