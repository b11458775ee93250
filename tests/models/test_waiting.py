"""A training step neither asks a GPU for a number nor mixes devices: it is walked on fake tensors.

Fake tensors have a device and a shape and no values: who reads a value gets an exception. They stand on
the meta device, since torch without CUDA can neither index nor differentiate what stands on a fake GPU.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from tiny import make_backbone, make_batch, make_model, make_pairs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plrhf.backbone import gptj
from plrhf.core.row_packing import UserSlots
from plrhf.core.types import PreferenceBatch
from plrhf.data.packing import TokenPair
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel

GPU = torch.device("meta")
PAIRS = [*make_pairs(5), TokenPair((1,) * 30, (2,) * 9, (3,) * 9)]  # some rows stand together
WAITS = (DataDependentOutputException, DynamicOutputShapeException)


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, and copies between them; numbers may differ."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
        devices = {one.device.type for one in tensors if one.dim() > 0}
        assert len(devices) <= 1, f"{func} on {devices}"
        return out


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast, which a GPU has, is not known of the device that stands for it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)


def on_fake_gpu(mode: FakeTensorMode, values: Any) -> Any:
    """The same tensors, or a module with them, on a GPU that is not there."""

    def moved(one: Tensor) -> Tensor:
        return mode.from_tensor(one).detach().to(GPU)

    if not isinstance(values, nn.Module):
        return apply_to_collection(values, Tensor, moved)
    for module in values.modules():
        for name, one in module._parameters.items():
            if one is not None:
                module._parameters[name] = nn.Parameter(moved(one), one.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else moved(buffer)
        for name in getattr(module, "_defaults", ()):  # of a metric
            setattr(module, name, moved(getattr(module, name)))
    return values


def step(model: Any, batch: PreferenceBatch) -> None:
    """Take a step's loss and gradients, and a batch of validation, on fake tensors."""
    model = model.train()
    batch.ref_logps = torch.zeros(len(batch), 2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # as those it makes there are
        model, batch = on_fake_gpu(mode, model), on_fake_gpu(mode, batch)
        model.reduction.follow(GPU)
        with OneDevice():
            loss, _ = model.training_loss(batch)
            loss.backward()
            model.validation_step(batch, 0)
    learned = [one for one in model.parameters() if one.grad is not None]
    assert len(learned) > 5 and all(one.grad.device == GPU for one in learned)


MODELS = [
    (PersonalDPOPolicy, "soft_prompt", "gptj"),
    (PersonalDPOPolicy, "late_soft_prompt", "gptj"),
    (PersonalRewardModel, "film_last", "gptj"),
    (PersonalRewardModel, "film_every_block", "gptj"),
    (PersonalRewardModel, "late_soft_prompt", "llama"),
    (PersonalDPOPolicy, "film_last", "llama"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "aggregator", "family"), MODELS)
def test_a_step_waits_for_nothing(kind: Any, aggregator: str, family: str) -> None:
    model = make_model(kind, backbone=make_backbone(family), aggregator=aggregator)
    step(model, make_batch(PAIRS, slots=model.user_slots))


@pytest.mark.slow
def test_weights_of_users_wait_for_nothing() -> None:
    step(make_model(PersonalRewardModel, reduce="tail"), make_batch(PAIRS))


def test_a_batch_goes_to_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a step needs, which would else stop the program on its way to the GPU."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda one: one.to(GPU))
    devices: list[torch.device] = []
    batch = make_batch(PAIRS, slots=UserSlots(2, 2)).pin_memory()
    apply_to_collection(batch, Tensor, lambda one: devices.append(one.device))
    assert len(devices) > 10 and set(devices) == {GPU}


@pytest.mark.slow
def test_waiting_is_found() -> None:
    """Without what the loader reads off rows, the step has to ask for it; and the walk notices."""
    batch = make_batch(PAIRS)
    batch.index = None
    with pytest.raises(WAITS):
        step(make_model(PersonalDPOPolicy, backbone=make_backbone("llama")), batch)


@pytest.mark.slow
def test_another_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_cpu(*given: Any, **how: Any) -> Any:
        layout = attention_layout(*given, **how)
        layout.rotations = layout.rotations.cpu()
        return layout

    attention_layout = gptj.attention_layout
    monkeypatch.setattr(gptj, "attention_layout", on_the_cpu)
    with pytest.raises(AssertionError, match="_to_copy"):
        step(make_model(PersonalDPOPolicy), make_batch(PAIRS))
