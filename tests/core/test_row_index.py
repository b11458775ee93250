"""What is read off rows before they go to a GPU, by hand and against what positions may see."""

from __future__ import annotations

import pytest
import torch
from tiny import make_batch, make_pairs
from torch import Tensor, tensor

from plrhf.backbone.masks import PackedRows, visibility
from plrhf.core.row_index import Extent, RowIndex, extent_of, predecessors
from plrhf.core.row_packing import RowPacking, UserSlots
from plrhf.core.types import PADDING, PROMPT
from plrhf.data.packing import TokenPair, two_rows


def test_predecessors_by_hand() -> None:
    segment = tensor([[0, 0, 1, 1, 2, 2, 2, -1], [0, 1, 2, 2, -1, -1, -1, -1]])
    before = predecessors(segment)
    assert before[0, 2:7].tolist() == [1, 2, 1, 4, 5]  # rejected starts at the prompt's end too
    assert before[1, 1:4].tolist() == [0, 0, 2]


def test_an_index_by_hand() -> None:
    index = RowIndex.of(tensor([[0, 0, 1, 2, 2], [0, 1, 1, 2, -1]]))
    assert index.row.tolist() == [0, 0, 0, 1, 1, 1]
    assert index.column.tolist() == [2, 3, 4, 1, 2, 3]
    assert index.before.tolist() == [1, 1, 3, 0, 1, 0]
    assert index.extent == Extent(first_read=0, n_causal=3)  # the first rejected token at 3
    assert index.extent.shifted_by(4) == Extent(4, 7)


def naive_extent(rows: PackedRows) -> Extent:
    """By counting what each position sees."""
    prompt = (rows.segment == PROMPT).int().cumprod(dim=1).sum(dim=1)
    n_before = torch.arange(1, rows.segment.shape[1] + 1)
    causal = (visibility(rows).sum(dim=2) == n_before) | (rows.segment == PADDING)
    n_causal = int(causal.all(dim=0).int().cumprod(dim=0).sum())
    return Extent(max(0, int(prompt.min()) - 1), n_causal)


PAIRS = {
    "unequal": make_pairs(7),
    "one": make_pairs(1),
    "no rejected": [TokenPair(one.prompt, one.chosen, ()) for one in make_pairs(4)],
    "no chosen": [TokenPair(one.prompt, (), one.rejected) for one in make_pairs(4)],
    "one prompt": [TokenPair((1,) * 5, one.chosen, one.rejected) for one in make_pairs(4)],
    "one long": [*make_pairs(5), TokenPair((1,) * 20, (2,) * 9, (3,) * 9)],
}


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("slots", [UserSlots(), UserSlots(2), UserSlots(2, 2), UserSlots(1, 1)])
def test_extents_are_those_of_what_is_seen(pairs: str, slots: UserSlots) -> None:
    segment = make_batch(PAIRS[pairs], padding=1).segment
    packing = RowPacking.of(segment, slots)
    whole: Tensor = torch.nn.functional.pad(segment, (slots.n_vectors, 0), value=PROMPT)
    if packing is None:
        found, rows = extent_of(segment).shifted_by(slots.n_vectors), PackedRows(whole, whole)
    else:
        packed = packing.pack(whole.repeat(slots.n_contexts or 1, 1), PADDING)
        rows = PackedRows(packed, packed, packing.source_row, packing.branch)
        assert packing.extent is not None
        found = packing.extent
    assert found == naive_extent(rows)


def test_a_row_of_one_response_needs_no_mask() -> None:
    segment = make_batch(make_pairs(3), layout=two_rows).segment
    assert extent_of(segment).n_causal == segment.shape[1]
