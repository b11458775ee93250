"""Copies of a model are models of their own: deep copies, pickles, averaged weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import LORA, make_backbone, make_batch, make_model, make_pairs
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from plrhf.backbone.compiled import CompiledBlock
from plrhf.models.policy import PersonalDPOPolicy

BATCH = make_batch(make_pairs())


def margins(model: Any) -> Tensor:
    return model.eval().context_margins(BATCH)["user"]


def moved(model: Any) -> Any:
    """The model, every trained and frozen weight of its blocks moved."""
    with torch.no_grad():
        for name, value in model.backbone.named_parameters():
            if value.dim() == 2 and ("proj" in name or "fc_" in name):
                value.mul_(1.5)
    return model


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.slow
@pytest.mark.parametrize("take_copy", [copy.deepcopy, pickled])
@pytest.mark.parametrize("aggregator", ["soft_prompt", "film_every_block"])
@pytest.mark.parametrize("kind", ["gptj", "llama"])
def test_a_copy_computes_with_its_own_weights(
    kind: str, aggregator: str, take_copy: Callable[[Any], Any]
) -> None:
    backbone = make_backbone(kind, lora={**LORA, "dropout": 0.1})
    model = make_model(PersonalDPOPolicy, backbone=backbone, aggregator=aggregator)
    before = margins(model)
    other = take_copy(model)
    assert torch.equal(margins(other), before)
    changed = margins(moved(other))
    assert torch.equal(margins(model), before)  # the original is left alone
    assert not torch.allclose(changed, before, atol=1e-3)
    moved(model)
    assert torch.equal(margins(model), changed) and torch.equal(margins(other), changed)


@pytest.mark.slow
@pytest.mark.parametrize("take_copy", [copy.deepcopy, pickled])
def test_a_copy_of_compiled_blocks_is_of_compiled_blocks(take_copy: Callable[[Any], Any]) -> None:
    with torch.compiler.set_stance("force_eager"):
        model = make_model(PersonalDPOPolicy, backbone=make_backbone("llama", compiled=True))
        other = take_copy(model)
        kinds = [type(block) for one in (model, other) for block in one.backbone.blocks]
        assert len(set(kinds)) == 1 and issubclass(kinds[0], CompiledBlock)
        before = margins(model)
        assert not torch.allclose(margins(moved(other)), before, atol=1e-3)
        assert torch.equal(margins(model), before)
        losses = [one.train().loss(BATCH)[0] for one in (model, other)]
        assert not torch.allclose(*losses, atol=1e-3)


@pytest.mark.parametrize("kind", ["gptj", "llama"])
def test_an_averaged_model_computes_with_the_averaged_weights(kind: str) -> None:
    model = make_model(PersonalDPOPolicy, backbone=make_backbone(kind))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.25))
    average.update_parameters(model)  # the first one is a plain copy
    start = {name: value.clone() for name, value in model.named_parameters()}
    moved(model)
    average.update_parameters(model)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in expected.named_parameters():
            value.copy_(0.25 * start[name] + 0.75 * value)
    found = margins(average.module)
    torch.testing.assert_close(found, margins(expected), atol=1e-5, rtol=0)
    assert not torch.allclose(found, margins(model), atol=1e-3)


def test_gradients_of_a_copy_stay_with_the_copy() -> None:
    model = make_model(PersonalDPOPolicy)
    other = copy.deepcopy(model).train()
    other.loss(BATCH)[0].mean().backward()
    assert all(one.grad is None for one in model.parameters())
    trained = [one for one in other.backbone.parameters() if one.requires_grad]
    assert len(trained) > 0 and all(one.grad is not None for one in trained)
