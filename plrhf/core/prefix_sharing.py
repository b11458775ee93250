"""Packing of rows whose texts begin alike, so that what they share is computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from plrhf.core.row_index import Extent
from plrhf.core.row_packing import RowPacking, first_fit_decreasing
from plrhf.core.types import PADDING, PROMPT, REJECTED

ROOT = -1


class PrefixTree:
    """A tree of tokens, in which texts share the nodes of what they begin with.

    Attributes:
        parent: of each node, an earlier one or `ROOT`.
        source: index of the position that each node was added for.
    """

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.source: list[int] = []
        self._children: dict[tuple[int, Hashable], int] = {}

    def __len__(self) -> int:
        return len(self.parent)

    def add(self, node: int, token: Hashable, source: int) -> int:
        """Return the child of a node for a token, which is added if it is new."""
        child = self._children.setdefault((node, token), len(self))
        if child == len(self):
            self.parent.append(node)
            self.source.append(source)
        return child

    def order(self) -> tuple[list[int], list[int]]:
        """Return each node's place, parents first and subtrees together, and its last descendant's."""
        sizes = [1] * len(self)
        for node in range(len(self) - 1, -1, -1):
            if self.parent[node] != ROOT:
                sizes[self.parent[node]] += sizes[node]
        free = [0] * (
            len(self) + 1
        )  # the next free place of each node's children; the last: the root's
        places = []
        for node, parent in enumerate(self.parent):
            places.append(free[parent])
            free[parent] += sizes[node]
            free[node] = places[node] + 1
        return places, [place + size - 1 for place, size in zip(places, sizes, strict=True)]


def share_prefixes(
    input_ids: Tensor, segment: Tensor, trees: Sequence[Hashable], *, n_vectors: int = 0
) -> RowPacking:
    """Pack rows ``prompt | chosen | rejected`` so that rows of one tree share what their texts begin with.

    Of a conversation, a turn's prompt is the former turn's prompt and chosen reply, and of a ranking, all
    pairs have one prompt and few responses. The hidden state of a position depends on the tokens before it
    alone, so that this gives what separate rows give.

    Args:
        input_ids, segment: [R, L] int64 on the CPU. trees: which tree each row is in, [R].
        n_vectors: user vectors in front of each row, which must be the same in all rows of a tree.
    """
    length = segment.shape[1] + n_vectors
    built: defaultdict[Hashable, PrefixTree] = defaultdict(PrefixTree)
    nodes: list[list[int]] = []  # of each row's positions, in its order
    for row, key in enumerate(trees):
        nodes.append(_add_row(built[key], row * length, input_ids[row], segment[row], n_vectors))
    room = max((len(tree) for tree in built.values()), default=0)
    names = list(built)
    groups = first_fit_decreasing([len(built[name]) for name in names], room)

    until = torch.arange(room).repeat(len(groups), 1)
    start: dict[Hashable, int] = {}
    places: dict[Hashable, np.ndarray] = {}
    for number, members in enumerate(groups):
        before = 0
        for name in (names[member] for member in members):
            place, last = (np.array(one, dtype=np.int64) for one in built[name].order())
            until[number, before + place] = torch.from_numpy(before + last)
            start[name], places[name] = number * room + before, place
            before += len(built[name])

    targets = {name: start[name] + places[name] for name in names}
    kept = torch.nn.functional.pad(segment != PADDING, (n_vectors, 0), value=True)
    read = [targets[key][own] for key, own in zip(trees, nodes, strict=True)]
    n_prompt = (segment == PROMPT).sum(dim=1)
    packing = RowPacking(
        source=torch.tensor([one for name in names for one in built[name].source]),
        target=torch.from_numpy(np.concatenate([targets[name] for name in names])),
        read_source=kept.flatten().nonzero()[:, 0],
        read_target=torch.from_numpy(np.concatenate(read)),
        branch=None,
        until=until,
        n_rows=len(segment),
        n_packed=len(groups),
        length=length,
        packed_length=room,
        n_vectors=n_vectors,
    )
    is_padding = packing.pack(torch.nn.functional.pad(segment, (n_vectors, 0)), PADDING) == PADDING
    first_read = max(0, int(n_prompt.min()) - 1) + n_vectors
    packing.extent = Extent(first_read, _n_causal(until, is_padding))
    return packing


def _add_row(
    tree: PrefixTree, first: int, input_ids: Tensor, segment: Tensor, n_vectors: int
) -> list[int]:
    """Add a row's user vectors, prompt and responses to a tree; return the node of each position.

    Args:
        first: index of the row's first position among those of all rows.
    """
    node, found = ROOT, []
    for place in range(n_vectors):
        node = tree.add(node, ("vector", place), first + place)
        found.append(node)
    end, before = node, PROMPT
    pairs = zip(input_ids.tolist(), segment.tolist(), strict=True)
    for column, (token, mark) in enumerate(pairs, n_vectors):
        if mark == PADDING:
            continue
        if mark == PROMPT:
            end = node = tree.add(node, token, first + column)
        else:
            node = tree.add(
                end if mark != before and mark == REJECTED else node, token, first + column
            )
        before = mark
        found.append(node)
    return found


def _n_causal(until: Tensor, is_padding: Tensor) -> int:
    """Return how many first positions see all positions before them, in every row, of [N, M]."""
    sees_all = torch.ones_like(is_padding)
    place = torch.arange(1, until.shape[1])
    sees_all[:, 1:] = until.cummin(dim=1).values[:, :-1] >= place
    return int((sees_all | is_padding).all(dim=0).cumprod(dim=0).sum())
