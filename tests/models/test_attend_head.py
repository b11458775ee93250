"""GPO: a response attends to the responses of the user's pairs, and to nothing else."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor

from plrhf.core.types import UserBatch, UserContext
from plrhf.encoders import PairTokenEncoder
from plrhf.models.heads import AttendHead

HIDDEN, WIDTH, PAIRS = 5, 6, 3
USER_DIM = PAIRS * (2 * WIDTH + 1)
PRESENT = tensor([[True, True, True], [False, True, False], [False, False, False]])


def context(n_users: int = 3) -> UserContext:
    texts = torch.stack([torch.randperm(9)[:2] for _ in range(3 * n_users)]).view(n_users, 3, 2)
    return UserContext(hidden=torch.randn(9, HIDDEN), texts=texts, present=PRESENT[:n_users])


def encoder(**settings: Any) -> PairTokenEncoder:
    given = {"n_users": 4, "user_dim": USER_DIM, "hidden_size": HIDDEN, "max_pairs": PAIRS}
    made = PairTokenEncoder(**{**given, **settings}, vocabulary=torch.zeros(9, USER_DIM))
    nn.init.normal_(made.chosen)
    return made


def head(**settings: Any) -> AttendHead:
    given = {"pairs": PAIRS, "width": WIDTH, "layers": 2, "attention_heads": 1}
    made = AttendHead(hidden_size=HIDDEN, user_dim=USER_DIM, **{**given, **settings})
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made.eval()


def encoded(made: PairTokenEncoder, given: UserContext) -> Tensor:
    batch = UserBatch(torch.zeros(len(given.present), dtype=torch.int64), torch.zeros(3, 0), given)
    return made(batch)


def attention(layer: Any, asking: Tensor, given: Tensor) -> Tensor:
    """One head: what a token [d] takes from the tokens [n, d]."""
    inputs, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
    q, k, v = (
        one @ inputs[at * WIDTH : (at + 1) * WIDTH].T + bias[at * WIDTH : (at + 1) * WIDTH]
        for at, one in enumerate((asking, given, given))
    )
    weights = torch.stack([q @ key / sqrt(WIDTH) for key in k]).softmax(0)
    return layer.self_attn.out_proj((weights[:, None] * v).sum(0))


def by_hand(model: AttendHead, target: Tensor, tokens: Tensor) -> Tensor:
    """The naive twin for one response and the tokens of one user, [n, d]."""
    context, state = torch.cat([model.nobody[0], tokens]), model.target(target)
    for layer in model.transformer.layers:
        new = []
        for one in (*context, state):
            one = layer.norm1(one + attention(layer, one, context))
            new.append(layer.norm2(one + layer.linear2(torch.relu(layer.linear1(one)))))
        context, state = torch.stack(new[:-1]), new[-1]
    return model.out(state)[0]


def test_rewards_are_those_of_one_response_and_one_user_after_the_other() -> None:
    made, model, given = encoder(), head(), context()
    pooled = torch.randn(1, 3, 2, HIDDEN)
    with torch.no_grad():
        rewards = model(model.read(pooled), encoded(made, given), None)  # type: ignore[arg-type]
        for user in range(3):
            tokens = [
                made.layers(made.response(given.hidden[text]) + (1 - side) * made.chosen)
                for pair, there in zip(given.texts[user], PRESENT[user], strict=True)
                for side, text in enumerate(pair)
                if there
            ]
            of_user = torch.stack(tokens) if len(tokens) > 0 else torch.empty(0, WIDTH)
            for side in (0, 1):
                expected = by_hand(model, pooled[0, user, side], of_user)
                torch.testing.assert_close(rewards[0, user, side], expected, atol=1e-5, rtol=1e-5)


def test_the_order_of_pairs_says_nothing_and_who_chose_what_does() -> None:
    made, model, given = encoder(), head(), context()
    pooled = model.read(torch.randn(1, 3, 2, HIDDEN))
    order = tensor([2, 0, 1])
    shuffled = UserContext(given.hidden, given.texts[:, order], given.present[:, order])
    found = [
        model(pooled, encoded(made, one), None)[0]  # type: ignore[arg-type]
        for one in (given, shuffled, given.swapped)
    ]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert (found[0] - found[2]).abs().amax(1)[:2].min() > 1e-3
    torch.testing.assert_close(found[0][2], found[2][2])  # of nobody's pairs
    loss = found[0].sum()
    loss.backward()
    assert all(one.grad is not None for one in model.parameters())


def test_more_pairs_than_there_is_room_for_are_cut_and_fewer_leave_room() -> None:
    made, given = encoder(), context()
    wide = UserContext(
        given.hidden, given.texts.repeat(1, 2, 1), torch.ones(3, 6, dtype=torch.bool)
    )
    narrow = UserContext(given.hidden, given.texts[:, :1], torch.ones(3, 1, dtype=torch.bool))
    whole = UserContext(given.hidden, given.texts, torch.ones(3, 3, dtype=torch.bool))
    vectors = encoded(made, whole).unflatten(1, (PAIRS, -1))
    assert encoded(made, wide).unflatten(1, (PAIRS, -1)).equal(vectors)
    found = encoded(made, narrow).unflatten(1, (PAIRS, -1))
    assert found[:, 0].equal(vectors[:, 0]) and not found[:, 1:].any()
    assert vectors[..., -1].eq(1).all() and not encoder().generic(1).any()
    with pytest.raises(ValueError, match=r"^aggregator\.user_dim=39 .* Set aggregator.user_dim=15"):
        AttendHead(hidden_size=HIDDEN, user_dim=39, pairs=3, width=2)
    with pytest.raises(ValueError, match=r"^aggregator\.user_dim=8 .* Set aggregator.user_dim=9"):
        encoder(user_dim=8)
