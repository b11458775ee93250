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


def test_where_nobody_has_pairs_all_are_the_generic_user() -> None:
    made, model, given = encoder(), head(), context()
    pooled = model.read(torch.randn(1, 3, 2, HIDDEN))
    some = model(pooled, encoded(made, given), None)  # type: ignore[arg-type]
    none = model(pooled, made.generic(3), None)  # type: ignore[arg-type]
    torch.testing.assert_close(none[0, 2], some[0, 2])
    assert (none[0, :2] - some[0, :2]).abs().max() > 1e-4


def padded(model: AttendHead, features: Tensor, user: Tensor) -> Tensor:
    """The naive twin for many: torch's layers on sequences of one length, with tokens none attends to."""
    given = user.unflatten(-1, (PAIRS, -1))
    tokens = given[..., :-1].unflatten(-1, (2, -1)).flatten(1, 2)
    nobody = model.nobody.expand(len(given), -1, -1)
    sequence = torch.cat([nobody, tokens, features.flatten(0, 1)], dim=1)
    absent = given[..., -1].lt(0.5).repeat_interleave(2, dim=1)
    unseen = torch.ones(sequence.shape[:2], dtype=torch.bool)  # the responses asked, too
    unseen[:, 0], unseen[:, 1:-2] = False, absent
    found = model.transformer(sequence, src_key_padding_mask=unseen)[:, -2:]
    return model.out(found)[..., 0].view(features.shape[:3])


@pytest.mark.parametrize("layers", [1, 2])
def test_users_of_as_many_pairs_together_are_those_of_padded_sequences(layers: int) -> None:
    n_users = 12
    models = [head(layers=layers, attention_heads=2).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    made = encoder()
    present = torch.rand(n_users, PAIRS) < 0.5
    texts = torch.randint(9, (n_users, PAIRS, 2))
    users = UserBatch(
        torch.zeros(n_users, dtype=torch.int64),
        torch.zeros(n_users, 0),
        UserContext(torch.randn(9, HIDDEN), texts, present),
    )
    vectors = made(users).detach()
    both = torch.cat([vectors, made.generic(n_users)])  # contexts of the users and of nobody
    pooled = torch.randn(2, n_users, 2, HIDDEN)
    given = [both.clone().requires_grad_() for _ in models]
    rewards = models[0](models[0].read(pooled), given[0], None)  # type: ignore[arg-type]
    expected = padded(models[1], models[1].read(pooled), given[1])
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-5)
    for found in (rewards, expected):
        found.square().sum().backward()
    is_token = torch.cat([vectors, torch.zeros_like(vectors)]) != 0
    is_token = is_token.unflatten(1, (PAIRS, -1))
    is_token[..., -1] = False
    is_token = is_token.flatten(1)
    slopes = [torch.where(is_token, one.grad, 0.0) for one in given if one.grad is not None]
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-4, rtol=1e-4)
    assert slopes[0].any()
    for own, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-4, rtol=1e-4)


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
    torch.testing.assert_close(found[:, 0], vectors[:, 0])
    assert not found[:, 1:].any()
    assert vectors[..., -1].eq(1).all() and not encoder().generic(1).any()
    with pytest.raises(ValueError, match=r"^aggregator\.user_dim=39 .* Set aggregator.user_dim=15"):
        AttendHead(hidden_size=HIDDEN, user_dim=39, pairs=3, width=2)
    with pytest.raises(ValueError, match=r"^aggregator\.user_dim=8 .* Set aggregator.user_dim=9"):
        encoder(user_dim=8)
