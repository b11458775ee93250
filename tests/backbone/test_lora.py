"""Fused LoRA layers against PEFT's own forward: values, gradients, and what is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from tiny import LORA, assert_same, gradients, make_backbone, make_batch, make_pairs, perturb
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from plrhf.backbone import devices, lora
from plrhf.backbone.lora import FusedLoraLinear, SparseDropout


def lora_layer(
    change: Callable[[Any], Any] | None = None, *, dropout: float = 0.0, dtype: Any = torch.float32
) -> FusedLoraLinear:
    """A fused layer of 5 to 7 with adapters that have been trained, always the same one."""
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(5, 7)).to(dtype)
    config = LoraConfig(r=2, lora_alpha=6, lora_dropout=dropout, target_modules=["0"])
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    perturb(model, "lora_B")
    lora.fuse_lora(model)
    layer: Any = model.base_model.model[0]
    assert type(layer) is FusedLoraLinear
    if change is not None:
        change(layer)
    return layer


def outcome(layer: Any, forward: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
    """Outputs and all gradients of a forward pass, always under the same random state."""
    layer.zero_grad()
    given = x.clone().requires_grad_()
    torch.manual_seed(11)
    output = forward(layer, given)
    weight = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output.float() * weight).sum().backward()
    after = torch.rand(3)  # the same where as much was drawn
    assert given.grad is not None
    return {"y": output.detach(), "dx": given.grad, "after": after, **gradients(layer)}


def assert_is_pefts(layer: Any, x: Tensor, *, atol: float = 1e-5) -> None:
    found = []
    for kind in (FusedLoraLinear, LoraLinear):
        values = outcome(layer, kind.forward, x)
        found.append({name: value.clone() for name, value in values.items()})
    assert_same(*found, atol=atol)


def spied_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows with each forward pass that takes PEFT's way."""
    calls: list[str] = []
    naive = LoraLinear.forward

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append("PEFT")
        return naive(self, x, *args, **kwargs)

    monkeypatch.setattr(LoraLinear, "forward", forward)
    return calls


@pytest.mark.parametrize(
    ("change", "can_fuse"),
    [
        (None, True),
        (lambda layer: layer.enable_adapters(False), False),
        (lambda layer: layer.merge(), False),
        (lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.0)}), True),
        (lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.4)}), False),
        (lambda layer: layer.base_layer.weight.requires_grad_(True), False),
    ],
)
def test_fused_lora_is_pefts(change: Any, can_fuse: bool) -> None:
    layer = lora_layer(change)
    assert lora.can_fuse(layer) == can_fuse
    assert_is_pefts(layer, torch.randn(3, 11, 5))


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(3, 11, 5), (1, 5), (2, 3, 7, 5)])
def test_fused_lora_with_dropout_is_pefts(rate: float, shape: tuple[int, ...]) -> None:
    layer = lora_layer(dropout=rate)
    assert lora.can_fuse(layer)
    assert_is_pefts(layer, torch.randn(shape), atol=1e-5 / (1 - rate))


def test_fused_lora_with_dropout_drops_nothing_in_evaluation() -> None:
    layer = lora_layer(dropout=0.5)
    x = torch.randn(4, 5)
    assert not torch.equal(layer(x), layer(x))
    plain = lora_layer()
    torch.testing.assert_close(layer.eval()(x), plain(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_lora_of_slices_and_transposes_is_pefts(dropout: float) -> None:
    layer = lora_layer(dropout=dropout)
    assert_is_pefts(layer, torch.randn(3, 11, 9)[:, 2:, :5])
    whole = torch.randn(5, 6, 2)
    x = whole.permute(2, 1, 0)
    found = [forward(layer, x) for forward in seeded(FusedLoraLinear, LoraLinear)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def seeded(*kinds: Any) -> list[Callable[..., Tensor]]:
    """The forward passes of these kinds of layer, each under the same random state."""

    def of(kind: Any) -> Callable[..., Tensor]:
        def forward(layer: Any, x: Tensor) -> Tensor:
            torch.manual_seed(5)
            return kind.forward(layer, x)

        return forward

    return [of(kind) for kind in kinds]


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_fused_lora_in_mixed_precision(dropout: float, weights: torch.dtype) -> None:
    layer = lora_layer(dropout=dropout, dtype=weights)

    def autocast(kind: Any) -> Callable[..., Tensor]:
        def forward(layer: Any, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return kind.forward(layer, x)

        return forward

    x = torch.randn(4, 5)
    fused, naive = (outcome(layer, autocast(kind), x) for kind in (FusedLoraLinear, LoraLinear))
    assert fused["y"].dtype == torch.bfloat16 and fused["dx"].dtype == torch.float32
    assert all(value.dtype == torch.float32 for name, value in fused.items() if "lora" in name)
    assert_same(fused, naive, atol=0.06)


def test_dropout_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of log(4 / 3) in the exponential numbers is one more that is kept."""
    step = math.log(4 / 3)
    draws = iter([0.5 * step, 1.5 * step, 0.1 * step, 2.5 * step, 9 * step])

    class Scripted:
        def __init__(self, _: Any) -> None: ...

        def standard_exponential(self, count: int) -> Any:
            return np.array([next(draws), next(draws)] + [1e9] * (count - 2))

    monkeypatch.setattr(np.random, "Generator", Scripted)
    dropout = SparseDropout(0.25)
    assert dropout.dropped(9).tolist() == [0, 2]  # gaps of 1, 2 and far past the end
    assert dropout(torch.full((2, 3), 3.0)).tolist() == [[0, 4, 4], [0, 4, 4]]  # gaps of 1 and 3


def test_dropout_draws_on_where_the_gaps_were_short(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short:
        def __init__(self, _: Any) -> None: ...

        def standard_exponential(self, count: int) -> Any:
            return np.zeros(count)

    monkeypatch.setattr(np.random, "Generator", Short)
    assert SparseDropout(0.01).dropped(1000).tolist() == list(range(1000))


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.7])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    dropout, n = SparseDropout(rate), 2**20
    kept = torch.ones(n, dtype=torch.float64)
    kept[dropout.dropped(n)] = 0
    within = 5 * (rate * (1 - rate) / n) ** 0.5
    assert abs(float(kept.mean()) - (1 - rate)) < within
    centred = kept - kept.mean()
    for step in (1, 2, 3, 4):  # neighbours are dropped independently
        assert (
            abs(float((centred[step:] * centred[:-step]).mean())) < 5 * rate * (1 - rate) / n**0.5
        )
    assert abs(float(dropout(torch.ones(n)).mean()) - 1) < within / (1 - rate)
    # The first and the last number are dropped as often as the others.
    ends = torch.zeros(3)
    for _ in range(4000):
        found = torch.ones(3).index_fill(0, dropout.dropped(3), 0)
        ends += (1 - found) / 4000
    assert (ends - rate).abs().max() < 5 * (rate * (1 - rate) / 4000) ** 0.5


def test_dropout_near_one_is_finite() -> None:
    assert torch.isfinite(SparseDropout(1 - 1e-9)(torch.ones(1000))).all()
    assert torch.isfinite(SparseDropout(1e-12)(torch.ones(1000))).all()
    assert torch.equal(SparseDropout(0.0)(torch.ones(9)), torch.ones(9))


def test_dropout_follows_torchs_seed() -> None:
    dropout, found = SparseDropout(0.3), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(dropout.dropped(200).tolist())
    assert found[0] == found[1] != found[2]


def test_of_dropout_the_dropped_and_their_positions_are_kept() -> None:
    layer, held = lora_layer(dropout=0.3), {}

    def keep(value: Tensor) -> Tensor:
        held[value.data_ptr()] = value.nbytes
        return value

    x = torch.randn(64, 5, requires_grad=True)
    torch.manual_seed(4)
    n_dropped = layer.lora_dropout["default"].dropped(x.numel()).numel()
    torch.manual_seed(4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        layer(x)
    weights = sum(one.nbytes for one in layer.parameters() if one.dim() == 2)
    low = 64 * 2 * 4
    assert sum(held.values()) == x.nbytes + 12 * n_dropped + weights + low


def test_peft_computes_what_is_not_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied_on(monkeypatch)
    layer = lora_layer(dropout=0.3)
    layer(torch.randn(4, 5))
    assert calls == []
    elsewhere = lora_layer(dropout=0.3).to("meta")
    assert elsewhere(torch.empty(4, 5, device="meta")).device.type == "meta"
    assert calls == ["PEFT"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # as a plan for a GPU has them
        layer(mode.from_tensor(torch.empty(4, 5)))
    assert calls == ["PEFT"] * 2


def test_dropout_elsewhere_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "computes_on_cpu", lambda _: False)
    dropout, values = SparseDropout(0.3), torch.randn(50)
    torch.manual_seed(2)
    found = dropout(values)
    torch.manual_seed(2)
    assert torch.equal(found, nn.Dropout(0.3)(values))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trunk_with_dropout_is_that_of_pefts_layers(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed blocks draw the same numbers again."""
    found = []
    batch = make_batch(make_pairs())
    for kind in (FusedLoraLinear, LoraLinear):
        backbone = make_backbone(
            lora={**LORA, "dropout": 0.2}, gradient_checkpointing=checkpointing
        )
        for module in backbone.modules():
            if isinstance(module, LoraLinear):
                module.__class__ = kind
        torch.manual_seed(1)
        hidden = backbone.train()(batch.input_ids, batch.segment, batch.position_ids)
        hidden.square().sum().backward()
        found.append({"hidden": hidden.detach(), **gradients(backbone)})
    assert_same(*found, atol=1e-3)
    assert len(found[0]) > 6 * 2


def test_merged_lora_is_the_same_with_and_without_the_adapter() -> None:
    """PEFT would take the adapter out of the weight as soon as it is switched off."""
    plain, layer, x = lora_layer(), lora_layer(), torch.randn(3, 11, 5)
    lora.merge_lora(nn.Sequential(layer))
    assert layer.merged and not torch.equal(layer.base_layer.weight, plain.base_layer.weight)
    for on in (True, False, True):
        plain.enable_adapters(on)
        layer.enable_adapters(on)
        torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=0)
    assert layer.merged
    assert (plain(x) - plain.base_layer(x)).abs().max() > 0.1


def test_merged_backbones_write_and_have_a_reference_as_before() -> None:
    backbone = make_backbone("gptj").eval()
    perturb(backbone, "lora_B")
    ids = torch.randint(2, 30, (3, 7))
    whole = torch.ones_like(ids)

    def states() -> dict[str, Tensor]:
        with torch.no_grad(), backbone.reference():
            reference = backbone.call_trunk(ids, None, attention_mask=whole)
        with torch.no_grad():
            return {
                "own": backbone.call_trunk(ids, None, attention_mask=whole),
                "reference": reference,
            }

    before = states()
    backbone.merge_adapters()
    assert_same(before, states(), atol=1e-5)
    assert (before["own"] - before["reference"]).abs().max() > 0.01


def test_lora_of_few_bits_is_not_merged() -> None:
    layer = lora_layer(dtype=torch.bfloat16)
    lora.merge_lora(nn.Sequential(layer))
    assert not layer.merged
