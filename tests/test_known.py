"""Values of texts on disk: found again, added to, never trusted where they are not whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from tiny import make_backbone, make_model
from torch import Tensor

from plrhf.data.known import KnownTexts
from plrhf.data.module import EVERYTHING, PairDataset, PreferenceData
from plrhf.data.packing import TokenPair
from plrhf.evaluate import prepare
from plrhf.policy import PersonalDPOPolicy
from plrhf.reward import PersonalRewardModel

TEXTS = [((1, 2), (3,)), ((1,), (2, 3)), ((), (1, 2, 3)), ((1, 2, 3), ()), ((7,), (8,))]


def test_what_was_added_is_found(tmp_path: Path) -> None:
    assert KnownTexts(tmp_path / "none").find(TEXTS) == (None, [0, 1, 2, 3, 4])
    values = torch.randn(5, 3)
    KnownTexts(tmp_path).add([TEXTS[3], TEXTS[0]], values[[3, 0]])
    found, missing = KnownTexts(tmp_path).find(TEXTS)
    assert missing == [1, 2, 4]
    assert found is not None and found[[0, 3]].equal(values[[0, 3]]) and found[1].eq(0).all()
    KnownTexts(tmp_path).add([TEXTS[2], TEXTS[4], TEXTS[1]], values[[2, 4, 1]])
    found, missing = KnownTexts(tmp_path).find(TEXTS)
    assert missing == [] and found is not None and found.equal(values)


def test_half_written_and_damaged_files_are_passed_over(tmp_path: Path) -> None:
    KnownTexts(tmp_path).add(TEXTS[:2], torch.ones(2, 1))
    (whole,) = tmp_path.iterdir()
    bits = whole.read_bytes()
    (tmp_path / "killed.part").write_bytes(bits[: len(bits) // 2])
    (tmp_path / "cut.safetensors").write_bytes(bits[:-3])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    found, missing = KnownTexts(tmp_path).find(TEXTS)
    assert missing == [2, 3, 4] and found is not None and found[:2].eq(1).all()


def prepared(model: Any, cache_dir: Path, pairs: list[TokenPair]) -> tuple[Any, list[int]]:
    """A dataset of these pairs prepared for the model, and how many rows each batch had."""
    data = object.__new__(PreferenceData)
    data.share = EVERYTHING
    data.eval_batch_size = 2
    data.datasets = {"train": PairDataset.of_tokens(pairs)}
    rows: list[int] = []
    counted = type(model.backbone).forward

    def forward(self: Any, inputs: Tensor, *others: Any) -> Tensor:
        rows.append(len(inputs))
        return counted(self, inputs, *others)

    model.backbone.forward = forward.__get__(model.backbone)
    prepare(model, data, Trainer(accelerator="cpu", logger=False), cache_dir=cache_dir)
    return data.datasets["train"], rows


PAIRS = [
    TokenPair((5, 6), (1, 2), (3,)),
    TokenPair((5, 6), (3,), (4, 4)),
    TokenPair((7,), (1,), (2,)),
]


@pytest.mark.parametrize("kind", [PersonalDPOPolicy, PersonalRewardModel])
def test_a_second_run_computes_nothing_and_has_the_same(kind: Any, tmp_path: Path) -> None:
    def model(seed: int) -> Any:
        trainable = "lora" if kind is PersonalDPOPolicy else "frozen"
        made = make_model(kind, backbone=make_backbone(trainable=trainable), aggregator="film_last")
        torch.manual_seed(seed)
        for parameter in made.encoder.parameters():  # another user model on the same backbone
            parameter.data.normal_()
        return made

    first, rows = prepared(model(1), tmp_path, PAIRS)
    assert (
        sum(rows) == 3
    )  # five texts of two prompts: three share a prompt, one of them stays alone
    again, none = prepared(model(2), tmp_path, PAIRS)
    assert none == []
    at = torch.arange(3)
    name = "ref_logps" if kind is PersonalDPOPolicy else "hidden"
    assert getattr(first, name)[at].equal(getattr(again, name)[at])
    more, rows = prepared(model(3), tmp_path, [*PAIRS, TokenPair((7,), (9,), (1,))])
    assert rows == [1]  # the one text that is new
    assert getattr(more, name)[at].equal(getattr(first, name)[at])


def test_another_backbone_has_its_own(tmp_path: Path) -> None:
    for change in (0.0, 1e-6):  # less than the export's fingerprint sees
        model = make_model(PersonalDPOPolicy)
        model.backbone.model.get_output_embeddings().weight.data[0, 0] += change
        assert prepared(model, tmp_path, PAIRS)[1] != []
    assert len(list(tmp_path.iterdir())) == 2
