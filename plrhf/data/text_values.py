"""Values computed once per distinct text of a dataset, and looked up for each pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from plrhf.core.progress import Progress
from plrhf.core.types import PreferenceBatch
from plrhf.data.dataset import SINGLE_PROCESS, PairDataset, RankShard, TextValues, longest_first
from plrhf.data.packing import TokenPair, packed
from plrhf.data.store import Indices, LazySequence
from plrhf.data.text_value_cache import KnownTextValues, TokenText, text_keys

TEXTS_PER_WRITE = 65_536
"""Number of texts whose values are computed before they are written to the cache."""


class ResponseTexts(LazySequence[TokenText]):
    """The texts (prompt, response) of pairs, two for each pair.

    Text 2 i is the chosen response of pair i with its prompt, text 2 i + 1 the rejected one.

    Args:
        numbers: numbers of the texts in this sequence, in its order.
    """

    def __init__(self, pairs: Sequence[TokenPair], numbers: Indices) -> None:
        self.pairs, self._numbers = pairs, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def select(self, indices: Indices) -> Self:
        """Return the texts at these indices."""
        return type(self)(self.pairs, self._numbers[indices])

    def item(self, index: int) -> TokenText:
        """Return the text at an index."""
        pair_index, is_rejected = divmod(int(self._numbers[index]), 2)
        pair = self.pairs[pair_index]
        return pair.prompt, pair.rejected if is_rejected == 1 else pair.chosen


def distinct_texts(pairs: Sequence[TokenPair]) -> tuple[ResponseTexts, Tensor]:
    """Find the distinct texts of pairs, in order of first appearance.

    Returns:
        The M texts, and the index of each pair's chosen and rejected text among them, [N, 2] int64.
    """
    every = ResponseTexts(pairs, np.arange(2 * len(pairs)))
    _, first, which = np.unique(text_keys(every), return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))
    return ResponseTexts(pairs, np.sort(first)), torch.from_numpy(rank[which]).view(-1, 2)


def _keys(texts: ResponseTexts) -> Tensor:
    return torch.from_numpy(text_keys(texts))


def repeated_texts(dataset: PairDataset) -> tuple[Tensor, Tensor]:
    """Find the texts that are in two or more pairs of a dataset.

    Returns:
        Their keys, ascending, and the number of pairs of each, both [n] int64.
    """
    known = dataset.hidden
    if known is not None and known.keys is not None:
        keys, of_pair = known.keys, known.of_pair
    else:
        texts, of_pair = distinct_texts(dataset.pairs)
        keys = _keys(texts)
    counts = of_pair.flatten().bincount(minlength=len(keys))
    keys, order = keys.sort()
    counts = counts[order]
    return keys[counts > 1], counts[counts > 1]


def independent_pairs(dataset: PairDataset, n_users: int) -> Tensor:
    """Count how many answers of each user do not follow from their others, [n_users] int64.

    Choices between T texts determine at most T - 1 differences of rewards; in general T less the number
    of groups of texts that choices connect (the rank of the incidence matrix). Pairs that were derived
    from votes or rankings are many more than that.
    """
    known = dataset.ref_logps if dataset.hidden is None else dataset.hidden
    of_pair = (distinct_texts(dataset.pairs)[1] if known is None else known.of_pair).numpy()
    users = dataset.user_id.numpy()[:, None]
    n_texts = int(of_pair.max(initial=0)) + 1
    nodes, ends = np.unique(users * n_texts + of_pair, return_inverse=True)
    chosen, rejected = ends.reshape(-1, 2).T
    links = coo_array((np.ones(len(chosen)), (chosen, rejected)), shape=(len(nodes), len(nodes)))
    _, group = connected_components(links, directed=False)
    first_of_group = np.unique(group, return_index=True)[1]
    owner = nodes // n_texts
    counts = np.bincount(owner, minlength=n_users)
    counts -= np.bincount(owner[first_of_group], minlength=n_users)
    if dataset.feedback is not None and dataset.feedback.rating is not None:  # of one text each
        counts += np.bincount(users[dataset.feedback.rating >= 0, 0], minlength=n_users)
    return torch.from_numpy(counts)


def texts_as_pairs(
    texts: Sequence[TokenText], *, share_prompts: bool
) -> tuple[list[TokenPair], Tensor]:
    """Arrange texts as pairs, so that a function of batches of pairs can compute their values.

    Args:
        share_prompts: whether two texts of one prompt become one pair; otherwise each text becomes
            a pair with an empty rejected response.

    Returns:
        P pairs, and the index of their two responses in `texts`, [P, 2] int64, N for an empty one.
    """
    pairs, indices = [], []
    waiting: dict[tuple[int, ...], int] = {}
    for index, (prompt, response) in enumerate(texts):
        if share_prompts and prompt in waiting:
            first = waiting.pop(prompt)
            pairs.append(TokenPair(prompt, texts[first][1], response))
            indices.append([first, index])
        elif share_prompts:
            waiting[prompt] = index
        else:
            waiting[(index,)] = index
    for index in waiting.values():
        pairs.append(TokenPair(*texts[index], ()))
        indices.append([index, len(texts)])
    return pairs, torch.tensor(indices, dtype=torch.int64).view(-1, 2)


def compute_text_values(
    dataset: PairDataset,
    compute: Callable[[PreferenceBatch], Tensor],
    batch_size: int,
    cache: KnownTextValues | None = None,
    *,
    shard: RankShard = SINGLE_PROCESS,
    what: str = "reading texts",
) -> TextValues | None:
    """Compute `compute(batch)` [B, 2, ...] once per distinct text; None for an empty dataset.

    Args:
        what: how the progress bar names the work.
        cache: values of other runs, read and added to by rank 0 alone. The other ranks pass None
            and are told what is missing.
    """
    texts, of_pair = distinct_texts(dataset.pairs)
    values, missing = (None, [*range(len(texts))]) if cache is None else cache.find(texts)
    missing, shape = shard.from_rank_zero((missing, None if values is None else values.shape))
    if shape is not None:
        values = shard.sum_over_ranks(torch.zeros(shape) if values is None else values)
    share_prompts = dataset.layout is packed
    with Progress(what, total=len(missing)) as progress:
        for start in range(0, len(missing), TEXTS_PER_WRITE):
            wanted = missing[start : start + TEXTS_PER_WRITE]
            new = [texts[index] for index in wanted]
            own = _own_values(
                new, compute, batch_size, shard, progress, share_prompts=share_prompts
            )
            found = shard.sum_over_ranks(own)
            if cache is not None:
                cache.add(new, found)
            values = torch.zeros(len(texts), *found.shape[1:]) if values is None else values
            values[wanted] = found
    return None if values is None else TextValues(values, of_pair, _keys(texts))


def _own_values(
    texts: Sequence[TokenText],
    compute: Callable[[PreferenceBatch], Tensor],
    batch_size: int,
    shard: RankShard,
    progress: Progress,
    *,
    share_prompts: bool,
) -> Tensor:
    """Compute the values [N, ...] of this rank's share of the texts; those of other ranks are 0."""
    pairs, indices = texts_as_pairs(texts, share_prompts=share_prompts)
    dataset = PairDataset.from_tokens(pairs)
    order = longest_first(dataset).tolist()
    values: Tensor | None = None
    for start in range(0, len(order), batch_size):
        batch = dataset.shard(order[start : start + batch_size], shard)
        found, counted = compute(batch), batch.counted()  # [B, 2, ...]
        if values is None:
            # One row more takes the values of empty responses.
            values = torch.zeros(len(texts) + 1, *found.shape[2:])
        values[indices[batch.row[counted]]] = found[counted].float()
        of_batch = indices[order[start : start + batch_size]]
        progress.update(int((of_batch < len(texts)).sum()))
    assert values is not None
    return values[: len(texts)]
