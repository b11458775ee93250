"""The trunk's fast paths against their naive twins: values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from tiny import (
    AGGREGATORS,
    LORA,
    assert_same,
    gradients,
    language_model,
    make_backbone,
    make_batch,
    make_model,
    make_pairs,
    perturb,
)
from torch import Tensor, tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers.masking_utils import causal_mask_function
from transformers.models.gptj.modeling_gptj import GPTJAttention, GPTJBlock

from plrhf.backbone import block_attention, chunked_attention, gptj
from plrhf.backbone.block_attention import block_mask
from plrhf.backbone.masks import FLEX, PackedRows, visibility
from plrhf.backbone.model import Backbone
from plrhf.backbone.tanh_gelu import tanh_gelu
from plrhf.core.errors import BadValue
from plrhf.core.row_packing import RowPacking
from plrhf.core.types import PreferenceBatch
from plrhf.data.packing import Layout, TokenPair, packed, two_rows
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel


@pytest.fixture(autouse=True)
def blocks_of_few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """That rows of a few tokens have positions without a mask."""
    monkeypatch.setattr(gptj, "KERNEL_BLOCK", 2)


def as_transformers(backbone: Backbone) -> Backbone:
    """The same backbone, its trunk and LoRA layers run by transformers and PEFT alone."""
    backbone.is_gptj = False
    for module in backbone.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = LoraLinear
        elif isinstance(module, GPTJBlock):
            module.__class__, module.attn.__class__ = GPTJBlock, GPTJAttention
    return backbone


@pytest.mark.sampled
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
def test_gptj_trunk_is_that_of_transformers(
    kind: Any, aggregator: str, checkpointing: bool
) -> None:
    found = []
    for change in (lambda backbone: backbone, as_transformers):
        backbone = change(make_backbone(gradient_checkpointing=checkpointing))
        model = make_model(kind, backbone=backbone, aggregator=aggregator)
        loss = model.train().loss(make_batch(make_pairs(), padding=3))[0]
        loss.mean().backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert_same(*found, atol=1e-5)


@pytest.mark.parametrize(
    "change", ["no padding", "one prompt", "prompts of one token", "long prompts"]
)
def test_gptj_trunk_for_rows_of_all_kinds(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs(5)
    if change == "no padding":
        pairs = [pairs[0]] * 5
    elif change == "one prompt":
        pairs = [type(pair)(pairs[0].prompt, pair.chosen, pair.rejected) for pair in pairs]
    elif change == "prompts of one token":
        pairs = [type(pair)(pair.prompt[:1], pair.chosen, pair.rejected) for pair in pairs]
    elif change == "long prompts":  # of which whole blocks of positions need no mask
        monkeypatch.undo()
        pairs = [type(pair)((pair.prompt * 70)[:70], pair.chosen, pair.rejected) for pair in pairs]
        assert layout_of(make_batch(pairs)).n_causal >= 2 * gptj.KERNEL_BLOCK
    found = []
    for turn in (lambda backbone: backbone, as_transformers):
        model = make_model(PersonalDPOPolicy, backbone=turn(make_backbone()))
        loss = model.loss(make_batch(pairs))[0].mean()
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert_same(*found, atol=1e-5)


def test_who_needs_a_mask_by_hand() -> None:
    # P P P C C R -      the first to miss something before it is the rejected token at 5;
    # P P P P C R R      the shortest prompt's end, 2, is the first that is read.
    pairs = [TokenPair((5, 6, 7), (8, 9), (3,)), TokenPair((5, 6, 7, 8), (9,), (3, 4))]
    together, apart = (layout_of(make_batch(pairs, layout=one)) for one in (packed, two_rows))
    assert (together.first_read, together.n_causal) == (2, 5)
    seen = together.mask[:, 0, -2:] == 0  # positions 5 and 6
    assert seen[0].int().tolist() == [[1, 1, 1, 0, 0, 1, 0], [1, 1, 1, 0, 0, 0, 1]]
    assert seen[1].int().tolist() == [[1, 1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1, 1]]
    assert apart.n_causal == 6  # all: a response alone sees all before it


def test_attention_drops_weights_in_training() -> None:
    backbone = make_backbone()
    for block in backbone.trunk.h:
        block.attn.attn_dropout.p = 0.5
    batch = make_batch(make_pairs())
    assert not torch.equal(run(backbone.train(), batch), run(backbone, batch))
    assert torch.equal(run(backbone.eval(), batch), run(backbone, batch))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("n_read", [13, 5])
def test_attention_is_that_of_a_mask_for_all(
    n_read: int, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_attention, "CHUNK", 4)
    torch.manual_seed(5)
    seen = torch.ones(3, 13, 13, dtype=torch.bool).tril()
    seen[0, 9:, 7:9] = False  # the first row's last positions miss two before them
    mask = torch.zeros(3, 1, 13, 13).masked_fill(~seen[:, None], -torch.inf)
    given = mask if chunked else mask[:, :, -n_read:]
    layout = gptj.AttentionLayout(8, 9, given, torch.empty(0), chunked)
    weight = torch.randn(3, n_read, 2, 5)
    values = [torch.randn(3, 2, length, 5) for length in (n_read, 13, 13)]
    masked = partial(scaled_dot_product_attention, attn_mask=mask[:, :, -n_read:])
    found = []
    for attend in (
        partial(gptj.attend, layout=layout, dropout=0.0),
        lambda *qkv: masked(*qkv).transpose(1, 2),
    ):
        leaves = [one.clone().requires_grad_() for one in values]
        heads = attend(*leaves)
        (heads * weight).sum().backward()
        of_leaves = {name: one.grad for name, one in zip("qkv", leaves, strict=True)}
        found.append({"heads": heads.detach(), **of_leaves})
    assert_same(*found, atol=1e-5)


def test_tanh_gelu_is_that_of_torch() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), tensor([0.0, -100.0, 100.0, 1e4])])
    weight = torch.randn(len(x), generator=torch.Generator().manual_seed(0))
    exact = x.double().requires_grad_()
    expected = gelu(exact, approximate="tanh")
    (expected * weight).sum().backward()
    x.requires_grad_()
    found = tanh_gelu(x)
    assert "TanhGelu" in type(found.grad_fn).__name__
    (found * weight).sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=2e-5, rtol=1e-5)
    for plain in (x.detach(), x.bfloat16()):
        torch.testing.assert_close(tanh_gelu(plain), gelu(plain, approximate="tanh"))


def test_pieces_of_attention_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_attention, "CHUNK", 4)
    assert chunked_attention.query_chunks(9, 9) == [(0, 4, 4), (4, 8, 8), (8, 9, 9)]
    assert chunked_attention.query_chunks(5, 9) == [
        (0, 4, 8),
        (4, 5, 9),
    ]  # the last five see four before them


def test_products_are_for_training_on_short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptj, "LONGEST_CHUNKED", 12)
    short, long = (make_batch([TokenPair((5,) * n, (8, 9), (3,))]) for n in (9, 10))
    assert layout_of(short).chunked and not layout_of(long).chunked
    assert layout_of(short).mask.shape == (1, 1, 12, 12)
    with torch.no_grad():
        assert not layout_of(short).chunked


def test_rows_of_one_response_share_one_mask() -> None:
    pairs = [TokenPair((5, 6, 7), (8, 9), (3,)), TokenPair((5, 6), (9,), (3, 4, 7))]
    layout = layout_of(make_batch(pairs, layout=two_rows))
    assert layout.mask.shape == (1, 1, 5, 5)
    assert torch.equal(layout.mask[0, 0] == 0, torch.ones(5, 5, dtype=torch.bool).tril())
    assert len(layout_of(make_batch(pairs)).mask) == 2


def layout_of(batch: PreferenceBatch) -> gptj.AttentionLayout:
    rows = PackedRows(batch.segment, batch.position_ids)
    return gptj.attention_layout(make_backbone().trunk, rows, dtype=torch.float32)


@pytest.mark.sampled
@pytest.mark.parametrize("longest", [0, 2048])
@pytest.mark.parametrize("layout", [packed, two_rows])
@pytest.mark.parametrize("aggregator", ["soft_prompt", "film_last"])
@pytest.mark.parametrize("kind", [PersonalRewardModel, PersonalDPOPolicy])
def test_gptj_trunk_in_mixed_precision(
    kind: Any, aggregator: str, layout: Layout, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What users and losses are made of keeps its precision."""
    monkeypatch.setattr(gptj, "LONGEST_CHUNKED", longest)
    found: list[dict[str, Tensor]] = []
    for change in (lambda backbone: backbone, as_transformers):
        model = make_model(kind, backbone=change(make_backbone()), aggregator=aggregator)
        model.hidden_for = partial(spied, model.hidden_for, found)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(make_batch(make_pairs(), layout=layout))[0]
        loss.mean().backward()
        found[-1] |= {"loss": loss.detach(), **gradients(model)}
    assert all(value.dtype == torch.float32 for value in found[0].values())
    assert_same(*found, atol=0.05)


def spied(hidden_for: Any, found: list[Any], batch: PreferenceBatch, user: Tensor) -> Tensor:
    """`hidden_for`, the user vectors it was given put into `found`."""
    found.append({"user": user.detach()})
    return hidden_for(batch, user)


def test_gptj_with_part_of_its_dimensions_turned() -> None:
    model = language_model()
    for block in model.transformer.h:
        block.attn.rotary_dim = 4
        block.attn.embed_positions = block.attn.embed_positions[:, [0, 1, 4, 5]]
    backbone = Backbone(model=model, trainable="frozen")
    batch = make_batch(make_pairs())
    found = run(backbone, batch)
    read = (batch.segment > 0)[..., None]
    expected = run(as_transformers(backbone), batch)
    torch.testing.assert_close(found * read, expected * read, atol=1e-5, rtol=0)
    assert expected.abs().max() > 0.1


def run(backbone: Backbone, batch: PreferenceBatch) -> Tensor:
    with torch.no_grad():
        return backbone(batch.input_ids, batch.segment, batch.position_ids)


@pytest.mark.parametrize("together", [False, True])
def test_block_mask_is_who_sees_whom(together: bool) -> None:
    segment = make_batch(make_pairs(11), padding=2).segment
    owner = None
    if together:
        packing = RowPacking.of(segment)
        assert packing is not None
        segment, owner = packing.pack(segment, -1), packing.source_row
    rows = PackedRows(segment, torch.arange(segment.shape[1]).expand_as(segment), owner)
    seen = visibility(rows)
    n_rows, length = segment.shape
    own = rows.mask_function(causal_mask_function)
    mask = block_mask(own, n_rows, length, length, segment.device)
    found = create_mask(mask.mask_mod, len(segment), 1, *seen.shape[1:], device="cpu")
    assert torch.equal(found[:, 0], seen)


@pytest.fixture
def plain_flex_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention in its plain form, which can be trained on CPUs though torch bars it there."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *qkv: None)
    with torch.compiler.set_stance("force_eager"):
        yield


BY_FLEX = [("llama", FLEX), ("llama", None), ("gptj", None)]


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("plain_flex_attention")
@pytest.mark.parametrize(
    ("kind", "aggregator"),
    [(PersonalRewardModel, "film_every_block"), (PersonalDPOPolicy, "late_soft_prompt")],
)
@pytest.mark.parametrize(("family", "attention"), BY_FLEX)
def test_flex_attention_is_that_of_a_mask(
    kind: Any, aggregator: str, family: str, attention: str | None, monkeypatch: Any
) -> None:
    found = []
    for in_blocks in (False, True):
        language = language_model(family)
        if in_blocks and attention is not None:
            language.set_attn_implementation(attention)
        backbone = Backbone(model=language, lora=LORA)
        perturb(backbone, "lora_B")
        if attention is None:  # as on a GPU
            monkeypatch.setattr(backbone, "_attends_in_blocks", lambda _, so=in_blocks: so)
        model = make_model(kind, backbone=backbone, aggregator=aggregator)
        loss = model.loss(make_batch(make_pairs(11), padding=2))[0]
        loss.mean().backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert_same(*found, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("plain_flex_attention")
def test_flex_attention_is_tried_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cpu = torch.device("cpu")
    assert block_attention.works_on(cpu, torch.float32, 8) and capsys.readouterr().out == ""

    def broken(query: Tensor, *_: Any, **__: Any) -> Tensor:
        return 1.1 * query

    def missing(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no\ncompiler")

    for number, wrong in enumerate((broken, missing)):
        monkeypatch.setattr(block_attention, "compile_friendly_flex_attention", wrong)
        assert not block_attention.works_on(cpu, torch.float32, 9 + number)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FlexAttention does not work here (it is ")
    assert lines[1] == (
        "FlexAttention does not work here (RuntimeError: no compiler); masks of all positions are used"
    )


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.long
def test_compiled_flex_attention_is_that_of_a_mask() -> None:
    batch = make_batch(make_pairs(11), padding=2)
    backbone = make_backbone("llama")
    expected = run(backbone, batch)
    backbone.trunk.set_attn_implementation(FLEX)
    found, read = run(backbone, batch), (batch.segment > 0)[..., None]
    torch.testing.assert_close(found * read, expected * read, atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("aggregator", "checkpointing", "compiler"),
    [("soft_prompt", True, "inductor"), ("film_every_block", False, "aot_eager")],
)
def test_compiled_blocks_are_plain_ones(
    aggregator: str, checkpointing: bool, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both compilers are given the same graphs; aot_eager takes no time to make code of them.

    Inductor gets the case of one graph, as behind a soft prompt all blocks' inputs have gradients.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    counters.clear()
    kinds = {"gradient_checkpointing": checkpointing}
    models = [
        make_model(
            PersonalDPOPolicy,
            backbone=make_backbone("llama", compiled=compiled, **kinds),
            aggregator=aggregator,
        )
        for compiled in (False, True)
    ]
    for n_pairs in (3, 7, 5):  # rows of other lengths
        found = []
        for model in models:
            model.train().zero_grad()
            loss = model.loss(make_batch(make_pairs(n_pairs, seed=n_pairs)))[0]
            loss.mean().backward()
            found.append({"loss": loss.detach(), **gradients(model)})
        assert_same(*found, atol=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2  # not one for every length
    assert torch.equal(
        *(model.eval().context_margins(make_batch(make_pairs()))["user"] for model in models)
    )


def test_other_attention_is_left_to_transformers() -> None:
    assert make_backbone().is_gptj
    assert not make_backbone("llama").is_gptj
    model = language_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(BadValue, match="padded rows"):  # it takes no mask of who sees whom
        Backbone(model=model, trainable="frozen")
