"""Frozen weights in four and eight bits: what is learned, kept, planned and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    LORA,
    assert_same,
    gradients,
    language_model,
    make_batch,
    make_model,
    make_pairs,
    perturb,
)
from torch import Tensor, nn

from plrhf.backbone import quantization
from plrhf.backbone.loading import empty_model, load_backbone
from plrhf.backbone.quantization import QuantizedShape, is_quantized
from plrhf.backbone.saving import without_frozen
from plrhf.core.errors import BadValue
from plrhf.models.policy import PersonalDPOPolicy


@pytest.fixture(scope="module", params=["gptj", "llama"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    language_model(request.param, vocabulary=97).save_pretrained(path)
    return path


def policy_on(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    backbone = load_backbone(path=str(folder), lora=LORA, **options)
    perturb(backbone, "lora_B")
    return make_model(PersonalDPOPolicy, backbone=backbone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_policy_learns_beside_weights_of_few_bits(folder: Path, kind: Any) -> None:
    model = policy_on(folder, quantization=kind).train()
    assert model.backbone.layout == "packed"
    layers = [one for one in model.modules() if is_quantized(one)]
    assert len(layers) == 3 * (6 if "gptj" in str(folder) else 7)
    before = model.backbone.fingerprint()
    batch = make_batch(make_pairs())
    batch.ref_logps = model.reference_logps(batch)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    found = []
    for _ in range(6):
        loss = model.loss(batch)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.95 * found[0]
    assert model.backbone.fingerprint() == before  # what is frozen stays as it was
    kept = without_frozen(model, model.state_dict())
    learned = {name for name, one in model.named_parameters() if one.requires_grad}
    assert learned <= kept.keys() and not any("base_layer" in name for name in kept)


@pytest.mark.slow
def test_nf4_is_the_model_of_its_weights_made_whole(folder: Path) -> None:
    """The naive twin: every weight read back from its bits into a plain layer."""
    import bitsandbytes

    found: list[dict[str, Tensor]] = []
    for whole in (False, True):
        model = policy_on(folder, quantization="nf4").train()
        for path, layer in list(model.named_modules()):
            if whole and is_quantized(layer):
                weight = bitsandbytes.functional.dequantize_4bit(
                    layer.weight.data, layer.weight.quant_state
                )
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
                plain.weight, plain.bias = nn.Parameter(weight, False), layer.bias
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, plain)
        loss = model.loss(make_batch(make_pairs()))[0].mean()
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert_same(*found, atol=1e-5)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_gradient(folder: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        options = {"quantization": "nf4", "gradient_checkpointing": checkpointing}
        model = policy_on(folder, **options).train()
        model.loss(make_batch(make_pairs()))[0].mean().backward()
        found.append(gradients(model))
    assert_same(*found, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_plan_counts_the_bytes_that_are_loaded(folder: Path, kind: Any) -> None:
    real = load_backbone(path=str(folder), trainable="frozen", quantization=kind).bare
    planned = empty_model(path=str(folder), quantization=kind)
    assert sum(isinstance(one, QuantizedShape) for one in planned.modules()) == sum(
        is_quantized(one) for one in real.modules()
    )

    held = sum(one.nbytes for one in real.parameters())
    for layer in real.modules():
        if is_quantized(layer):
            state = layer.weight.quant_state if kind == "nf4" else None
            held += 4 * layer.out_features if state is None else state.absmax.nbytes
    found = sum(one.nbytes for one in planned.parameters())
    assert abs(found - held) <= 8 * 3 * 7  # a byte of rounding a layer
    unseen = sum(one.n_uncounted for one in planned.modules() if isinstance(one, QuantizedShape))
    n_parameters = sum(one.numel() for one in language_model(folder.name[:-1]).parameters())
    assert sum(one.numel() for one in planned.parameters()) + unseen == n_parameters


def test_a_stand_in_gives_shapes_and_gradients_of_a_layer() -> None:
    layer = nn.Linear(6, 10)
    stand_in = QuantizedShape(layer, 4)
    x = torch.randn(3, 6, requires_grad=True)
    y = stand_in(x)
    y.sum().backward()
    assert y.shape == (3, 10) and x.grad is not None and x.grad.shape == x.shape
    assert stand_in.weight.nbytes == 30


def test_without_the_extra_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(BadValue) as caught:
        quantization.quantization_config("nf4", torch.float32)
    assert str(caught.value) == (
        "backbone.quantization='nf4' is not allowed: expected null where bitsandbytes is not "
        "installed. Run pip install -c constraints.txt -e '.[quant]', or set "
        "backbone.quantization=null."
    )


def test_rounded_weights_are_not_learned(folder: Path) -> None:
    with pytest.raises(BadValue, match="null with backbone.trainable=full"):
        load_backbone(path=str(folder), quantization="int8", trainable="full")
