"""Short rows put together: by hand, and against rows that stand apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import assert_same, gradients, make_backbone, make_batch, make_model, make_pairs
from torch import Tensor, nn, tensor

from plrhf.backbone import row_packing
from plrhf.backbone.masks import sees
from plrhf.backbone.row_packing import RowPacking, first_fit_decreasing
from plrhf.data.packing import TokenPair
from plrhf.models.optim import Optim
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel
from plrhf.models.sft import SupervisedPolicy

SEGMENT = tensor([[0, 0, 1, 2, 2], [0, 1, 2, -1, -1], [0, 2, -1, -1, -1]])


def apart(_segment: Tensor) -> None:
    """In the place of `RowPacking.of`: rows stay as they are."""


def test_first_fit_by_hand() -> None:
    # 6 and 3 leave 1; 5 and 5 leave 0; 2 finds no room there.
    assert first_fit_decreasing([3, 5, 6, 2, 5], 10) == [[2, 0], [1, 4], [3]]
    assert first_fit_decreasing([4, 0], 4) == [[0, 1]]
    assert first_fit_decreasing([], 4) == []


def test_rows_put_together_by_hand() -> None:
    packing = RowPacking.of(SEGMENT)
    assert packing is not None
    assert packing.source.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 10, 11]]
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
    assert packing.source.tolist() == [[3, 4, 5], [0, 1, -1]]
    assert packing.source_row.tolist() == [[1, 1, 1], [0, 0, -1]]
    assert packing.pack(tensor([[7, 8, 9]] * 3), -4).tolist() == [[7, 8, 9], [7, 8, -4]]


def test_pairs_of_a_row_do_not_see_one_another() -> None:
    packing = RowPacking.of(SEGMENT)
    assert packing is not None
    seen = sees(packing.pack(SEGMENT, -1), packing.source_row)
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


@pytest.mark.parametrize("backbone", ["gptj", "llama"])
@pytest.mark.parametrize("aggregator", ["soft_prompt", "film_last", "film_every_block"])
@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
def test_rows_together_are_rows_apart(
    kind: Any, aggregator: str, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [*make_pairs(11), TokenPair((1,) * 30, (2,) * 9, (3,) * 9)]
    rows: list[list[int]] = []  # of the trunk, forward by forward
    found = []
    for way in (RowPacking.of, apart):
        monkeypatch.setattr(row_packing.RowPacking, "of", way)
        model = make_model(kind, backbone=make_backbone(backbone), aggregator=aggregator)
        block = next(one for one in model.backbone.modules() if isinstance(one, nn.ModuleList))[0]
        rows.append([])
        block.register_forward_pre_hook(lambda _, given: rows[-1].append(len(given[0])))
        loss = model.loss(make_batch(pairs, padding=2))[0]
        loss.mean().backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert_same(*found, atol=1e-5)
    together, alone = rows[0][0], rows[1][0]
    # Where something in the trunk goes by row, rows stay as they are.
    assert together == alone if aggregator == "film_every_block" else together <= alone / 2


@pytest.mark.parametrize("responses", ["both", "chosen"])
def test_supervised_texts_together_are_texts_apart(
    responses: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [*make_pairs(11), TokenPair((1,) * 30, (2,) * 9, (3,) * 9)]
    found = []
    for way in (RowPacking.of, apart):
        monkeypatch.setattr(row_packing.RowPacking, "of", way)
        model = SupervisedPolicy(backbone=make_backbone(), optim=Optim(), responses=responses)
        loss = model.nll(make_batch(pairs))
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert_same(*found, atol=1e-5)
