"""Short rows packed into one, by hand."""

from __future__ import annotations

import torch
from lightning.fabric.utilities import move_data_to_device
from tiny import make_batch
from torch import nn, tensor

from plrhf.backbone.masks import PackedRows, visibility
from plrhf.core.row_packing import NO_USER, RowPacking, UserSlots, first_fit_decreasing
from plrhf.data.dataset import PairDataset
from plrhf.data.packing import TokenPair, two_rows

SEGMENT = tensor([[0, 0, 1, 2, 2], [0, 1, 2, -1, -1], [0, 2, -1, -1, -1]])


def test_first_fit_by_hand() -> None:
    # 6 and 3 leave 1; 5 and 5 leave 0; 2 finds no room there.
    assert first_fit_decreasing([3, 5, 6, 2, 5], 10) == [[2, 0], [1, 4], [3]]
    assert first_fit_decreasing([4, 0], 4) == [[0, 1]]
    assert first_fit_decreasing([], 4) == []


def test_rows_put_together_by_hand() -> None:
    packing = RowPacking.of(SEGMENT)
    assert packing is not None
    assert packing.source.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]
    assert packing.target.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert packing.source_row.tolist() == [[0, 0, 0, 0, 0], [1, 1, 1, 2, 2]]
    assert packing.pack(SEGMENT, -1).tolist() == [[0, 0, 1, 2, 2], [0, 1, 2, 0, 2]]
    values = torch.arange(30.0).view(3, 5, 2)
    back = packing.unpack(packing.pack(values))
    assert torch.equal(back, values * (SEGMENT >= 0)[..., None])


def test_padding_that_is_left_by_hand() -> None:
    packing = RowPacking.of(
        tensor([[0, 1, -1], [0, 1, 2], [-1, -1, -1]])
    )  # a row of nothing takes no room
    assert packing is not None
    assert packing.source.tolist() == [3, 4, 5, 0, 1]
    assert packing.source_row.tolist() == [[1, 1, 1], [0, 0, -1]]
    assert packing.pack(tensor([[7, 8, 9]] * 3), -4).tolist() == [[7, 8, 9], [7, 8, -4]]


def test_pairs_of_a_row_do_not_see_one_another() -> None:
    packing = RowPacking.of(SEGMENT)
    assert packing is not None
    seen = visibility(PackedRows(packing.pack(SEGMENT, -1), SEGMENT, packing.source_row))
    assert seen[1].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],  # the next pair's prompt
        [0, 0, 0, 1, 1],
    ]


def test_rows_that_cannot_be_fewer_stay() -> None:
    assert RowPacking.of(tensor([[0, 1, 2], [0, 1, -1]])) is None
    assert RowPacking.of(torch.zeros(0, 0, dtype=torch.int64)) is None


def test_user_vectors_in_front_take_room_by_hand() -> None:
    # With two vectors the rows take 7, 5 and 4 of 7 positions: none fit together, but without do.
    assert RowPacking.of(SEGMENT, UserSlots(2)) is None
    packing = RowPacking.of(SEGMENT[:, :4].masked_fill(SEGMENT[:, :4] == 2, -1), UserSlots(1))
    assert packing is not None  # rows of 4, 3 and 2 of 5: the first, and the others together
    assert (packing.n_rows, packing.n_packed, packing.length, packing.slots) == (
        3,
        2,
        5,
        UserSlots(1),
    )
    assert packing.source_row.tolist() == [[0, 0, 0, 0, -1], [1, 1, 1, 2, 2]]
    values = tensor([[70, 1, 2, 3, 0], [71, 4, 5, 0, 0], [72, 6, 0, 0, 0]])
    assert packing.pack(values, -9).tolist() == [[70, 1, 2, 3, -9], [71, 4, 5, 72, 6]]


def test_rows_repeated_are_packed_alike() -> None:
    packing = RowPacking.of(SEGMENT)
    assert packing is not None
    twice = packing.repeated(2)
    values = torch.arange(60.0).view(6, 5, 2)
    assert torch.equal(
        twice.pack(values), torch.cat([packing.pack(values[:3]), packing.pack(values[3:])])
    )
    assert torch.equal(
        twice.unpack(twice.pack(values)), values * (SEGMENT.repeat(2, 1) >= 0)[..., None]
    )
    assert twice.source_row.tolist() == [*packing.source_row.tolist(), [3] * 5, [4, 4, 4, 5, 5]]
    assert packing.repeated(1) is packing


def test_a_prompt_stands_once_for_all_contexts_by_hand() -> None:
    packing = RowPacking.of(SEGMENT[:2], UserSlots(1, n_contexts=2))
    assert packing is not None
    # Rows of 2 + 2 * (1 + 3) and 1 + 2 * (1 + 2): one each, of ten.
    ids = tensor([[50, 1, 2, 3, 4, 5], [60, 6, 7, 8, 0, 0]])  # vectors, then text
    ids = torch.cat([ids, ids + tensor([[1], [1]]) * (torch.arange(6) == 0)])
    assert packing.pack(ids, -9).tolist() == [
        [1, 2, 50, 3, 4, 5, 51, 3, 4, 5],
        [6, 60, 7, 8, 61, 7, 8, -9, -9, -9],
    ]
    assert packing.branch is not None
    assert packing.branch.tolist() == [
        [0, 0, 1, 1, 1, 1, 2, 2, 2, 2],
        [0, 1, 1, 1, 2, 2, 2, 0, 0, 0],
    ]
    assert packing.source_row.tolist() == [[0] * 10, [1] * 7 + [-1] * 3]
    # A prompt's last position stands for the last vector, which predicts the response.
    assert packing.unpack(packing.pack(ids)).tolist() == [
        [0, 0, 50, 3, 4, 5],
        [0, 60, 7, 8, 0, 0],
        [0, 0, 51, 3, 4, 5],
        [0, 61, 7, 8, 0, 0],
    ]
    alone = RowPacking.of(SEGMENT[:2], UserSlots(1, n_contexts=2), together=False)
    assert alone is not None and alone.slots == UserSlots(1, n_contexts=1)
    assert alone.repeated(2).pack(ids, -9).tolist() == [
        [1, 2, 50, 3, 4, 5],
        [6, 60, 7, 8, -9, -9],
        [1, 2, 51, 3, 4, 5],
        [6, 61, 7, 8, -9, -9],
    ]


def test_contexts_and_pairs_of_a_row_do_not_see_one_another() -> None:
    segment = tensor([[0, 1, 2, -1, -1, -1, -1], [0, 0, 0, 0, 0, 0, 1], [0, 1, 2, -1, -1, -1, -1]])
    packing = RowPacking.of(segment, UserSlots(1, n_contexts=2))  # rows of 7, 10 and 7
    assert packing is not None and packing.n_packed == 3
    packing = RowPacking.of(segment[[0, 2, 1]], UserSlots(1, n_contexts=1))  # 4, 4 and 8
    assert packing is not None and packing.n_packed == 2
    both = RowPacking.of(segment[:1], UserSlots(1, n_contexts=2))
    assert both is not None
    placed = nn.functional.pad(segment[:1], (1, 0)).repeat(2, 1)
    rows = PackedRows(both.pack(placed, -1), placed, both.source_row, both.branch)
    assert visibility(rows)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],  # prompt
        [1, 1, 0, 0, 0, 0, 0],  # vector of the first context
        [1, 1, 1, 0, 0, 0, 0],  # chosen
        [1, 1, 0, 1, 0, 0, 0],  # rejected
        [1, 0, 0, 0, 1, 0, 0],  # vector of the second
        [1, 0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 0, 1],
    ]


def test_a_packing_is_for_as_many_user_vectors_as_it_was_made_for() -> None:
    batch = make_batch(
        [TokenPair((1,) * 9, (3,), (4,)), *[TokenPair((1,), (2,), ())] * 7], slots=UserSlots(3)
    )
    assert batch.packing is not None
    assert batch.packing_for(UserSlots(3)) is batch.packing
    assert batch.packing_for(NO_USER) is None
    assert batch.pooled(torch.ones(2, 5), tensor([[0, 1]] * 8)).packing_for(UserSlots(3)) is None


def test_a_dataset_packs_the_rows_of_its_batches() -> None:
    pairs = [TokenPair((1,) * 6, (2,) * 3, (3,) * 3), *[TokenPair((1, 2), (3,), (4,))] * 3]
    dataset = PairDataset.from_tokens(pairs)
    packing = dataset.batch([0, 1, 2, 3]).packing
    assert packing is not None and packing.n_packed == 2  # 12, and three times 4
    dataset.user_slots = UserSlots(5)  # 17, 9, 9 and 9
    assert dataset.batch([0, 1, 2, 3]).packing is None
    assert dataset.batch([1, 2, 3]).packing is None  # alike: none has room
    dataset.user_slots, dataset.layout = NO_USER, two_rows
    assert dataset.batch([0, 1, 2, 3]).packing is None


def test_a_packing_goes_to_the_device_with_its_batch() -> None:
    batch = make_batch([TokenPair((1, 2, 3), (3,), (4,)), *[TokenPair((1,), (2,), ())] * 4])
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved.packing.source.device.type == moved.packing.target.device.type == "meta"
    assert moved.packing.source_row.shape == (batch.packing.n_packed, batch.packing.length)
