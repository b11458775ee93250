"""Aggregators: identity at the start, no user, positions, and what each refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import (
    AGGREGATORS,
    N_LAYERS,
    WIDTH,
    assert_same,
    gradients,
    language_model,
    make_aggregator,
    make_backbone,
    make_batch,
    make_model,
    make_pairs,
)
from torch import Tensor, nn, tensor

from plrhf.aggregators import Aggregator, ConcatSoftPrompt, FiLM
from plrhf.aggregators.base import spread_over_rows
from plrhf.aggregators.film import modulate
from plrhf.backbone.model import Backbone
from plrhf.core.errors import BadValue
from plrhf.core.types import PreferenceBatch
from plrhf.data.packing import packed, two_rows
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel


def film(**settings: Any) -> FiLM:
    return FiLM(**{"hidden_size": WIDTH, "n_blocks": N_LAYERS, **settings})


def plain(backbone: Backbone, batch: PreferenceBatch) -> Tensor:
    """Hidden states without any aggregator, [R, L, d]."""
    return backbone(batch.input_ids, batch.segment, batch.position_ids)


def test_spread_over_rows_by_hand() -> None:
    pairs = make_pairs(2)
    user = tensor([[1.0], [2.0], [10.0], [20.0]])  # two contexts of two pairs
    in_one = spread_over_rows(user, make_batch(pairs, layout=packed))
    in_two = spread_over_rows(user, make_batch(pairs, layout=two_rows))
    assert in_one.tolist() == [[[1.0], [2.0]], [[10.0], [20.0]]]
    assert in_two[..., 0].tolist() == [[1.0, 2.0, 1.0, 2.0], [10.0, 20.0, 10.0, 20.0]]


def test_modulate_by_hand() -> None:
    hidden = tensor([[[1.0, 2.0], [3.0, 4.0]]])  # [1, L, d]
    of_user = tensor([[[1.0, -1.0], [0.5, 10.0]]])  # gamma, beta
    # (1 + 1) * 1 + 0.5 = 2.5, (1 - 1) * 2 + 10 = 10
    assert modulate(hidden, of_user).tolist() == [[[2.5, 10.0], [6.5, 10.0]]]


@pytest.mark.parametrize("kind", ["gptj", "llama"])
@pytest.mark.parametrize("site", ["last", "every_block"])
@torch.no_grad()
def test_film_starts_as_the_identity(kind: str, site: Any) -> None:
    backbone, batch = make_backbone(kind), make_batch(make_pairs(5))
    aggregator = film(site=site, user_dim=4)
    hidden = aggregator(backbone, batch, torch.randn(10, 4))
    assert hidden.equal(plain(backbone, batch).expand(2, -1, -1, -1))


@pytest.mark.parametrize("kind", ["gptj", "llama"])
@pytest.mark.parametrize("name", AGGREGATORS)
@torch.no_grad()
def test_no_user_model_is_exactly_the_plain_model(kind: str, name: str) -> None:
    backbone, batch = make_backbone(kind), make_batch(make_pairs(5))
    hidden = make_aggregator(name)(backbone, batch, torch.empty(5, 0))
    assert hidden.equal(plain(backbone, batch)[None])


@pytest.mark.parametrize("name", AGGREGATORS)
@torch.no_grad()
def test_contexts_come_one_after_the_other(name: str) -> None:
    backbone, batch, aggregator = make_backbone(), make_batch(make_pairs(5)), make_aggregator(name)
    user = torch.randn(2, 5, aggregator.user_dim)
    both = aggregator(backbone, batch, user.flatten(0, 1))
    assert (both[0] - both[1]).abs().max() > 0.01
    for context in (0, 1):
        alone = aggregator(backbone, batch, user[context])
        torch.testing.assert_close(both[context], alone[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["gptj", "llama"])
@torch.no_grad()
def test_soft_prompt_takes_positions_in_front(kind: str) -> None:
    backbone, (pair,) = make_backbone(kind), make_pairs(1)
    vectors = torch.randn(3, WIDTH)
    batch = make_batch([pair], padding=4)
    found = ConcatSoftPrompt(hidden_size=WIDTH, n_tokens=3)(backbone, batch, vectors.view(1, -1))
    n_prompt, n_text = len(pair.prompt), len(pair.prompt) + len(pair.chosen)
    text = backbone.embed(batch.input_ids[:, :n_text])
    output = backbone.model(
        inputs_embeds=torch.cat([vectors[None], text], 1), output_hidden_states=True
    )
    expected = output.hidden_states[-1][0, 3:]
    read = slice(n_prompt - 1, n_text)  # earlier ones predict nothing of a response
    torch.testing.assert_close(found[0, 0, read], expected[read], atol=1e-5, rtol=0)


def test_a_late_soft_prompt_needs_a_model_that_reads_left_to_right() -> None:
    bert = Backbone(model=language_model("bert"), trainable="frozen")
    with pytest.raises(BadValue) as caught:
        make_model(PersonalRewardModel, backbone=bert, aggregator="late_soft_prompt")
    assert str(caught.value) == (
        "aggregator.position='after_prompt' is not allowed: expected before with bert, which reads a "
        "whole row at once. Set aggregator.position=before."
    )


@pytest.mark.parametrize(
    ("kind", "depth", "first"), [("gptj", 0, 0), ("llama", 0, 0), ("llama", 0.5, 1)]
)
@torch.no_grad()
def test_film_at_every_block_acts_on_each_blocks_output(
    kind: str, depth: float, first: int
) -> None:
    backbone, batch = make_backbone(kind), make_batch(make_pairs(3))
    aggregator = film(site="every_block", from_depth=depth, user_dim=4)
    nn.init.normal_(aggregator.to_film.weight, std=0.1)
    user = torch.randn(3, 4)
    found = aggregator(backbone, batch, user)[0]

    by_hand = aggregator.to_film.weight @ user.T  # [sites * 2 * d, B]
    gamma_beta = by_hand.T.view(3, N_LAYERS - first, 2, 1, WIDTH)
    done = []
    for site, block in enumerate(list(backbone.blocks)[first:]):
        forward = block.forward

        def modulated(*inputs: Any, site: int = site, forward: Any = forward, **how: Any) -> Any:
            output = forward(*inputs, **how)
            hidden = output[0] if isinstance(output, tuple) else output
            gamma, beta = gamma_beta[:, site, 0], gamma_beta[:, site, 1]
            hidden = hidden * (1 + gamma) + beta
            done.append(site)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        block.forward = modulated
    expected = plain(backbone, batch)
    assert done == list(range(N_LAYERS - first))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_film_leaves_no_hook_behind() -> None:
    backbone, batch = make_backbone(), make_batch(make_pairs(3))
    ids = batch.input_ids

    def written() -> Any:
        return backbone.trunk(input_ids=ids).last_hidden_state

    before, written_before = plain(backbone, batch), written()
    aggregator = make_aggregator("film_every_block")
    aggregator(backbone, batch, torch.randn(3, aggregator.user_dim))
    with pytest.raises(IndexError):  # a batch that fails inside the model
        bad = make_batch(make_pairs(3))
        bad.position_ids += 1000
        aggregator(backbone, bad, torch.randn(3, aggregator.user_dim))
    for name in ("film_every_block", "film_last"):
        user = torch.randn(3, aggregator.user_dim)
        with make_aggregator(name).decoding(backbone, ids, torch.ones_like(ids), user):
            assert not written().equal(written_before)
    assert plain(backbone, batch).equal(before) and written().equal(written_before)


def test_film_layer_by_hand() -> None:
    aggregator = film(layer_width=5, user_dim=2, layer_dropout=0.5).eval()
    nn.init.normal_(aggregator.to_film.weight)
    texts = torch.tensor([[0, 1], [2, 3], [1, 0]])
    batch = make_batch(make_pairs(3)).pooled(torch.randn(4, WIDTH), texts)
    user = torch.randn(3, 2)
    found = aggregator(make_backbone(), batch, user)
    assert batch.hidden is not None
    linear: Any = list(aggregator.layer.children())[2]
    layer = torch.tanh(
        nn.functional.layer_norm(batch.hidden, (WIDTH,)) @ linear.weight.T + linear.bias
    )
    gamma, beta = (user @ aggregator.to_film.weight.T).view(3, 2, 1, 5).unbind(1)
    torch.testing.assert_close(found[0], (1 + gamma) * layer[texts] + beta)
    assert aggregator.output_size == 5 and not aggregator.unembeddable
    assert list(map(id, aggregator.text_parameters())) == [id(linear.weight), id(linear.bias)]


@pytest.mark.parametrize(
    ("aggregator", "expected"),
    [
        (film(), (WIDTH, 0, True)),
        (film(user_dim=4), (4, 0, True)),
        (film(site="every_block"), (WIDTH, 0, False)),
        (ConcatSoftPrompt(hidden_size=WIDTH, n_tokens=3), (3 * WIDTH, 3, False)),
    ],
)
def test_what_an_aggregator_says_of_itself(aggregator: Aggregator, expected: Any) -> None:
    assert (aggregator.user_dim, aggregator.n_positions, aggregator.after_trunk) == expected
    assert aggregator.output_size == WIDTH and aggregator.unembeddable
    assert aggregator.text_parameters() == []


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [PersonalRewardModel, PersonalDPOPolicy])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_gradient_checkpointing_changes_no_gradient(model_class: Any, name: str) -> None:
    found, n_runs = [], []
    for checkpointing in (False, True):
        runs: list[int] = []
        backbone = make_backbone("llama", gradient_checkpointing=checkpointing)
        model = make_model(model_class, backbone=backbone, aggregator=name).train()
        first_of_block = next(backbone.blocks[1].children())
        first_of_block.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        model.loss(make_batch(make_pairs()))[0].mean().backward()
        found.append(gradients(model))
        n_runs.append(len(runs))
    assert_same(*found, atol=1e-6)
    assert n_runs[1] == n_runs[0] + 1  # the block ran again in the backward pass


@pytest.mark.parametrize("size", [1.0, 1e-3])
@torch.no_grad()
def test_film_is_computed_in_float32(size: float) -> None:
    """Against float64, in units of what users change; bfloat16 has no number between 1 and 1.0078."""
    hidden = torch.randn(5, 7, 64).bfloat16()
    of_user = size * torch.randn(5, 2, 64)
    gamma, beta = of_user.double().unsqueeze(2).unbind(1)
    exact = (1 + gamma) * hidden.double() + beta
    found = modulate(hidden, of_user)
    assert found.dtype == torch.bfloat16
    assert found.equal(exact.float().bfloat16())  # rounded once, at the end
    aggregator = film(user_dim=4)
    nn.init.normal_(aggregator.to_film.weight, std=size)
    user = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert aggregator.film(user).equal(aggregator.film(user.clone()))
        assert aggregator.film(user).dtype == torch.float32
        mapped = aggregator.film(user)
    assert mapped.equal(aggregator.film(user))  # autocast rounds nothing


@pytest.mark.parametrize(
    ("width", "site", "expected"),
    [(64, "last", 64), (4096, "last", 128), (16, "every_block", 16), (4096, "every_block", 32)],
)
def test_user_vectors_are_no_wider_than_makes_sense(width: int, site: Any, expected: int) -> None:
    with torch.device("meta"):
        aggregator = FiLM(hidden_size=width, n_blocks=3, site=site)
    assert aggregator.user_dim == expected


@torch.no_grad()
def test_dropping_the_shift_changes_what_is_the_same_for_both_responses_alone() -> None:
    whole, less = film(user_dim=4), film(user_dim=4)
    nn.init.normal_(whole.to_film.weight)
    less.to_film.weight.copy_(whole.to_film.weight)
    less.drop_shift()
    assert less.to_film.weight.shape == (WIDTH, 4)
    batch = make_batch(make_pairs(3)).pooled(
        torch.randn(4, WIDTH), torch.tensor([[0, 1], [2, 3], [1, 0]])
    )
    user, backbone = torch.randn(6, 4), make_backbone()
    one, other = whole(backbone, batch, user), less(backbone, batch, user)
    torch.testing.assert_close(one[:, :, 0] - one[:, :, 1], other[:, :, 0] - other[:, :, 1])
    assert not torch.allclose(one, other)
    in_every_block = film(site="every_block", user_dim=4)
    in_every_block.drop_shift()  # where later blocks see it, it stays
    assert in_every_block.to_film.weight.shape == (N_LAYERS * 2 * WIDTH, 4)


def test_widths_that_differ() -> None:
    """Some models embed tokens, run blocks and end in three widths (OPT-350m, ALBERT)."""
    widths: dict[str, Any] = {"hidden_size": 6, "n_blocks": 3}
    prompt = ConcatSoftPrompt(hidden_size=6, embedding_size=5, n_tokens=4)
    assert (prompt.user_dim, prompt.output_size) == (20, 6)
    assert prompt._vectors(torch.zeros(2, 20), torch.float32).shape == (2, 4, 5)
    every = FiLM(**widths, block_size=7, site="every_block")
    assert every.film(torch.zeros(2, 6)).shape == (2, 3, 2, 7) and every.output_size == 6
    assert FiLM(**widths, block_size=7).film(torch.zeros(2, 6)).shape == (2, 1, 2, 6)


BAD = [
    (
        lambda: ConcatSoftPrompt(hidden_size=WIDTH, n_tokens=0),
        "aggregator.n_tokens=0 is not allowed: expected a whole number from 1. "
        "Set aggregator.n_tokens=10.",
    ),
    (
        lambda: film(site="first"),
        "aggregator.site='first' is not allowed: expected last or every_block. "
        "Set aggregator.site=last.",
    ),
    (
        lambda: film(user_dim=0),
        "aggregator.user_dim=0 is not allowed: expected a whole number from 1 or null. "
        "Set aggregator.user_dim=1.",
    ),
    (
        lambda: film(layer_width=0),
        "aggregator.layer_width=0 is not allowed: expected a whole number from 1 or null. "
        "Set aggregator.layer_width=1.",
    ),
    (
        lambda: film(layer_width=8, site="every_block"),
        "aggregator.layer_width=8 is not allowed: expected null with site=every_block. "
        "Set aggregator.layer_width=null, or aggregator.site=last.",
    ),
    (
        lambda: film(from_depth=0.5),
        "aggregator.from_depth=0.5 is not allowed: expected 0 with site=last. "
        "Set aggregator.from_depth=0, or aggregator.site=every_block.",
    ),
    (
        lambda: film(layer_dropout=1.0),
        "aggregator.layer_dropout=1.0 is not allowed: expected a number from 0 and below 1. "
        "Set aggregator.layer_dropout=0.0.",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_settings(build: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build()
    assert str(caught.value) == message
