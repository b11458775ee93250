"""Packed rows: by hand, equal to two separate rows, equal to a plain model on one sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import (
    AGGREGATORS,
    USERS,
    WIDTH,
    assert_same,
    gradients,
    language_model,
    make_backbone,
    make_batch,
    make_model,
    make_pairs,
)
from torch import Tensor, tensor

from plrhf.data.packing import Layout, TokenPair, packed, two_rows
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel

HAND = [TokenPair((11, 12), (21,), (31, 32, 33)), TokenPair((13,), (22, 23), (34,))]


def test_packed_by_hand() -> None:
    input_ids, segment, position_ids = packed(HAND)
    assert input_ids.tolist() == [[11, 12, 21, 31, 32, 33], [13, 22, 23, 34, 0, 0]]
    assert segment.tolist() == [[0, 0, 1, 2, 2, 2], [0, 1, 1, 2, -1, -1]]
    assert position_ids.tolist() == [[0, 1, 2, 2, 3, 4], [0, 1, 2, 1, 0, 0]]


def test_two_rows_by_hand() -> None:
    input_ids, segment, position_ids = two_rows(HAND)
    assert input_ids.tolist() == [
        [11, 12, 21, 0, 0],
        [13, 22, 23, 0, 0],
        [11, 12, 31, 32, 33],
        [13, 34, 0, 0, 0],
    ]
    assert segment.tolist() == [
        [0, 0, 1, -1, -1],
        [0, 1, 1, -1, -1],
        [0, 0, 2, 2, 2],
        [0, 2, -1, -1, -1],
    ]
    assert position_ids.tolist() == [
        [0, 1, 2, 0, 0],
        [0, 1, 2, 0, 0],
        [0, 1, 2, 3, 4],
        [0, 1, 0, 0, 0],
    ]


@pytest.mark.parametrize("layout", [packed, two_rows])
def test_no_pairs_make_an_empty_batch(layout: Layout) -> None:
    assert [tuple(one.shape) for one in layout([])] == [(0, 0)] * 3


MODELS = [
    pytest.param(PersonalRewardModel, {"pooling": "last"}, id="reward-last"),
    pytest.param(PersonalRewardModel, {"pooling": "mean", "centring": 0.1}, id="reward-mean"),
    pytest.param(PersonalDPOPolicy, {"beta": 1.0}, id="dpo"),
]


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["gptj", "llama"])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize(("model_class", "settings"), MODELS)
def test_packed_equals_two_rows(
    kind: str, aggregator: str, model_class: Any, settings: dict[str, Any]
) -> None:
    def losses_and_gradients(layout: Layout, padding: int) -> tuple[Tensor, dict[str, Tensor]]:
        model = make_model(
            model_class, backbone=make_backbone(kind), aggregator=aggregator, **settings
        )
        loss, _ = model.loss(make_batch(make_pairs(), layout=layout, padding=padding))
        loss.mean().backward()
        return loss.detach(), gradients(model)

    naive_loss, naive_gradients = losses_and_gradients(two_rows, 0)
    assert naive_loss.std() > 0.01
    for part in ("lora_A", "lora_B", "generic_vector", "basis", "offsets"):
        # Gradients that vanish would agree whatever the code does.
        assert any(part in name and one.abs().max() > 1e-4 for name, one in naive_gradients.items())
    for padding in (0, 5):
        loss, grads = losses_and_gradients(packed, padding)
        torch.testing.assert_close(loss, naive_loss, atol=1e-5, rtol=0)
        assert_same(grads, naive_gradients, atol=1e-5)


def plain_sequence(plain: Any, vectors: Tensor, tokens: tuple[int, ...], at: int = 0) -> Any:
    """A Hugging Face model on tokens and user vectors [T, d] before the one at `at`, in one row.

    Returns:
        Hidden states and logits behind the tokens; those behind the last vector in place of those of the
        token before, which then predicts nothing.
    """
    text = plain.get_input_embeddings()(tensor([tokens]))
    whole = torch.cat([text[:, :at], vectors[None], text[:, at:]], 1)
    output = plain(inputs_embeds=whole, output_hidden_states=True)
    kept = [*range(at - 1), *range(max(at, 1) + len(vectors) - 1, whole.shape[1])]
    return output.hidden_states[-1][0, kept], output.logits[0, kept]


def user_vector(encoder: Any, user: int) -> Tensor:
    return encoder.generic_vector + encoder.offsets.weight[user] @ encoder.basis


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptj", "llama"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("aggregator", ["soft_prompt", "late_soft_prompt"])
@torch.no_grad()
def test_packed_rewards_equal_a_plain_model_on_one_sequence(
    kind: str, pooling: str, aggregator: str
) -> None:
    model = make_model(
        PersonalRewardModel, backbone=make_backbone(kind), aggregator=aggregator, pooling=pooling
    )
    found = model.context_margins(make_batch(make_pairs(), padding=2))
    for context in ("user", "generic"):
        for place, pair in enumerate(make_pairs()):
            user = USERS[place] if context == "user" else 0
            rewards = []
            for response in (pair.chosen, pair.rejected):
                vectors = user_vector(model.encoder, user).view(3, WIDTH)
                tokens = (*pair.prompt, *response)
                at = len(pair.prompt) if aggregator == "late_soft_prompt" else 0
                hidden, _ = plain_sequence(model.backbone.model, vectors, tokens, at)
                mine = hidden[len(pair.prompt) :]
                rewards.append(
                    model.head.weight[0] @ (mine.mean(0) if pooling == "mean" else mine[-1])
                )
            torch.testing.assert_close(
                found[context][place], rewards[0] - rewards[1], atol=1e-5, rtol=0
            )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptj", "llama"])
@pytest.mark.parametrize("aggregator", ["soft_prompt", "late_soft_prompt", "film_last"])
@torch.no_grad()
def test_packed_policy_equals_a_plain_model_on_one_sequence(kind: str, aggregator: str) -> None:
    model = make_model(
        PersonalDPOPolicy, backbone=make_backbone(kind), aggregator=aggregator, beta=0.7
    )
    base = language_model(kind)
    nothing = torch.empty(0, WIDTH)

    def policy_logits(user: int, tokens: tuple[int, ...], n_prompt: int) -> Tensor:
        vector = user_vector(model.encoder, user)
        at = n_prompt if aggregator == "late_soft_prompt" else 0
        if "soft_prompt" in aggregator:
            return plain_sequence(model.backbone.model, vector.view(3, WIDTH), tokens, at)[1]
        hidden, _ = plain_sequence(model.backbone.model, nothing, tokens)
        gamma, beta = (model.aggregator.to_film.weight @ vector).view(2, WIDTH)
        return model.backbone.model.get_output_embeddings()((1 + gamma) * hidden + beta)

    def logp(logits: Tensor, pair: TokenPair, response: tuple[int, ...]) -> Tensor:
        before = logits[len(pair.prompt) - 1 : -1].log_softmax(-1)
        return before[range(len(response)), response].sum()

    found = model.context_margins(make_batch(make_pairs(), padding=2))
    for context in ("user", "generic"):
        for place, pair in enumerate(make_pairs()):
            user = USERS[place] if context == "user" else 0
            ratios = []
            for response in (pair.chosen, pair.rejected):
                tokens = (*pair.prompt, *response)
                ours = logp(policy_logits(user, tokens, len(pair.prompt)), pair, response)
                reference = logp(plain_sequence(base, nothing, tokens)[1], pair, response)
                ratios.append(ours - reference)
            expected = 0.7 * (ratios[0] - ratios[1])
            torch.testing.assert_close(found[context][place], expected, atol=1e-5, rtol=0)
