"""Generation: many users at once equal one at a time, cached equals step by step, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import (
    AGGREGATORS,
    USERS,
    WIDTH,
    language_model,
    make_backbone,
    make_model,
    make_pairs,
)
from torch import tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from plrhf.aggregators import ConcatSoftPrompt
from plrhf.backbone.kv_cache import RoomyLayer
from plrhf.backbone.model import Backbone
from plrhf.core.types import CHOSEN, PROMPT, PreferenceBatch, UserBatch
from plrhf.models.generation import generate, left_padded
from plrhf.models.policy import PersonalDPOPolicy

PROMPTS = [pair.prompt for pair in make_pairs()]  # of 2 to 9 tokens
N_NEW = 6

both_kinds = pytest.mark.parametrize("kind", ["gptj", "llama"])
all_aggregators = pytest.mark.parametrize("aggregator", AGGREGATORS)


class Numbers:
    """A tokenizer whose text is the token numbers."""

    def __init__(self, end: int = 0) -> None:
        self.eos_token_id, self.pad_token_id = end, 0

    def batch_decode(self, rows: Any, *, skip_special_tokens: bool) -> list[str]:
        special = {self.eos_token_id, self.pad_token_id} if skip_special_tokens else set()
        return [" ".join(str(t) for t in row if t not in special) for row in rows.tolist()]


def make_policy(kind: str = "gptj", aggregator: Any = "soft_prompt", **settings: Any) -> Any:
    policy = make_model(
        PersonalDPOPolicy, backbone=make_backbone(kind), aggregator=aggregator, **settings
    )
    with torch.no_grad():  # far enough from the generic user for other words
        policy.encoder.offsets.weight.mul_(20.0)
    return policy


def user_batch(*ids: int) -> UserBatch:
    return UserBatch(user_id=tensor(ids), features=torch.zeros(len(ids), 0))


def write(policy: Any, prompts: Any, users: Any, **options: Any) -> list[str]:
    settings = {"max_new_tokens": N_NEW, "temperature": 0.0, **options}
    return generate(policy, Numbers(), prompts, users, **settings)


def test_left_padded_by_hand() -> None:
    ids, mask = left_padded([(5,), (6, 7, 8)])
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.slow
@both_kinds
@all_aggregators
def test_many_users_at_once_equal_one_at_a_time(kind: str, aggregator: str) -> None:
    policy = make_policy(kind, aggregator)
    together = write(policy, PROMPTS, user_batch(*USERS))
    alone = [
        write(policy, [prompt], user_batch(user))[0]
        for prompt, user in zip(PROMPTS, USERS, strict=True)
    ]
    assert together == alone
    assert together == write(policy, PROMPTS, user_batch(*USERS), batch_size=3)
    same_prompt = write(policy, [PROMPTS[0]] * 5, user_batch(1, 2, 3, 4, 5))
    assert len(set(same_prompt)) > 1  # users matter


@pytest.mark.slow
@both_kinds
@pytest.mark.parametrize(("aggregator", "n_first"), [("film_last", 1), ("late_soft_prompt", 4)])
def test_users_of_one_prompt_share_its_reading(kind: str, aggregator: str, n_first: int) -> None:
    policy = make_policy(kind, aggregator)
    read: list[tuple[int, ...]] = []
    embeddings = policy.backbone.trunk.get_input_embeddings()
    embeddings.register_forward_hook(lambda _module, _in, output: read.append(output.shape[:2]))
    prompts = [(5, 6, 7), (8, 9), (5, 6, 7), (5, 6, 7), (4,)]
    together = write(policy, prompts, user_batch(1, 2, 3, 4, 5))
    assert read[0] == (3, 2)  # three prompts, without their last tokens
    read = read[1:] if aggregator == "late_soft_prompt" else read  # placeholders, for their shape
    assert read[1] == (5, n_first)  # a prompt's last token, and user vectors
    assert all(shape == (5, 1) for shape in read[2:]) and len(read) == 1 + N_NEW
    alone = [
        write(policy, [prompt], user_batch(user))[0] for user, prompt in enumerate(prompts, start=1)
    ]
    assert together == alone


@pytest.mark.slow
@both_kinds
@all_aggregators
def test_a_cache_with_room_writes_what_that_of_transformers_does(
    kind: str, aggregator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(kind, aggregator)
    with monkeypatch.context() as patch:
        patch.setattr(DynamicLayer, "update", None)  # nothing is copied token by token
        found = [write(policy, PROMPTS, user_batch(*USERS)), write(policy, PROMPTS, None)]
    monkeypatch.setattr(Backbone, "cache", lambda *_: DynamicCache())
    naive = [write(policy, PROMPTS, user_batch(*USERS)), write(policy, PROMPTS, None)]
    assert found == naive


def test_a_layer_with_room_holds_what_one_without_does() -> None:
    roomy, naive = RoomyLayer(9), DynamicLayer()

    def update(n_rows: int, length: int) -> int:
        """Where the keys lie once both have been given new positions."""
        new = torch.randn(n_rows, 2, length, 7), torch.randn(n_rows, 2, length, 6)
        for one, other in zip(roomy.update(*new), naive.update(*new), strict=True):
            assert one.equal(other)
        assert roomy.get_seq_length() == naive.get_seq_length()
        return roomy.update(*(one[:, :, :0] for one in new))[0].data_ptr()

    assert update(3, 4) == update(3, 1)
    for layer in (roomy, naive):
        layer.batch_select_indices(tensor([2, 0, 0, 1, 2]))
    assert update(5, 2) == update(5, 2)
    assert roomy.get_mask_sizes(1) == naive.get_mask_sizes(1) == (10, 0)


def test_windows_keep_their_own_cache() -> None:
    backbone = make_backbone("llama")
    backbone.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    backbone.config.sliding_window = 4
    assert [type(layer).__name__ for layer in backbone.cache(8).layers] == [
        "RoomyLayer",
        "DynamicSlidingWindowLayer",
        "RoomyLayer",
    ]


@pytest.mark.slow
@both_kinds
@all_aggregators
@torch.no_grad()
def test_equals_step_by_step_without_a_cache(kind: str, aggregator: str) -> None:
    policy = make_policy(kind, aggregator).eval()

    def next_token(prompt: tuple[int, ...], written: tuple[int, ...], user: int) -> int:
        text = tensor([prompt + written])
        users = user_batch(user)
        batch = PreferenceBatch(
            user_id=users.user_id,
            features=users.features,
            input_ids=text,
            segment=tensor([[PROMPT] * len(prompt) + [CHOSEN] * len(written)]),
            position_ids=torch.arange(text.shape[1])[None],
            row=tensor([0]),
        )
        hidden = policy.aggregator(policy.backbone, batch, policy.encoder(users))
        return int(policy.backbone.unembed(hidden[0, 0, -1]).argmax())

    expected = []
    for prompt, user in zip(PROMPTS, USERS, strict=True):
        tokens: tuple[int, ...] = ()
        for _ in range(N_NEW):
            tokens = (*tokens, next_token(prompt, tokens, user))
        expected.append(" ".join(map(str, tokens)))
    assert write(policy, PROMPTS, user_batch(*USERS)) == expected


@pytest.mark.slow
@both_kinds
@all_aggregators
def test_without_users_the_base_model_writes(kind: str, aggregator: str) -> None:
    policy = make_policy(kind, aggregator)
    base = language_model(kind).eval()
    expected = []
    for prompt in PROMPTS:
        ids = tensor([prompt])
        output = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=N_NEW,
            pad_token_id=0,
        )
        expected += Numbers().batch_decode(output[:, len(prompt) :], skip_special_tokens=True)
    assert write(policy, PROMPTS, None) == expected
    assert write(policy, PROMPTS, user_batch(*[0] * 7)) != expected  # the policy has learned


@all_aggregators
def test_a_vanilla_policy_writes_the_same_for_everybody(aggregator: str) -> None:
    policy = make_model(PersonalDPOPolicy, aggregator=aggregator, personal=False)
    texts = write(policy, PROMPTS, user_batch(*USERS))
    assert texts == write(policy, PROMPTS, user_batch(*reversed(USERS)))
    assert texts != write(policy, PROMPTS, None)


@all_aggregators
def test_a_text_ends_with_the_end_token(aggregator: str) -> None:
    policy, users = make_policy(aggregator=aggregator), user_batch(*USERS)
    whole = [text.split() for text in write(policy, PROMPTS, users)]
    end = whole[0][2]
    found = generate(
        policy, Numbers(int(end)), PROMPTS, users, max_new_tokens=N_NEW, temperature=0.0
    )
    for text, tokens in zip(found, whole, strict=True):
        expected = tokens[: tokens.index(end)] if end in tokens else tokens
        assert text.split() == expected
    assert 0 < len(found[0].split()) <= 2 or found[0] == ""


@pytest.mark.slow
def test_a_text_ends_with_any_end_token_of_the_backbone() -> None:
    policy, users = make_policy(), user_batch(*USERS)
    whole = [text.split() for text in write(policy, PROMPTS, users)]
    end = whole[0][2]
    policy.backbone.model.get_base_model().generation_config.eos_token_id = [0, int(end)]
    for text, tokens in zip(write(policy, PROMPTS, users), whole, strict=True):
        expected = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        # Of the tokens Numbers calls special only 0 is left out.
        assert text.split() == [one for one in expected if one != "0"]
    assert len(write(policy, PROMPTS, users)[0].split()) == whole[0].index(end) + 1


@pytest.mark.slow
def test_other_generation_settings_of_the_backbone_change_nothing() -> None:
    policy, users = make_policy(), user_batch(*USERS)
    expected = [write(policy, PROMPTS, users), write(policy, PROMPTS, None)]
    config = policy.backbone.model.get_base_model().generation_config
    leaky = {
        **{"repetition_penalty": 5.0, "num_beams": 3, "min_new_tokens": 5, "temperature": 7.0},
        **{"no_repeat_ngram_size": 1, "suppress_tokens": [int(expected[0][0].split()[0])]},
        **{"forced_eos_token_id": 5, "bad_words_ids": [[3]], "do_sample": True, "top_k": 3},
        **{"length_penalty": 3.0, "exponential_decay_length_penalty": (1, 9.0)},
    }
    for name, value in leaky.items():
        setattr(config, name, value)
    assert [write(policy, PROMPTS, users), write(policy, PROMPTS, None)] == expected
    assert policy.backbone.model.get_base_model().generation_config is config


def test_a_seed_decides_what_is_sampled_and_leaves_the_generator_alone() -> None:
    policy, users = make_policy(), user_batch(*USERS)
    state = torch.get_rng_state()
    one = write(policy, PROMPTS, users, temperature=1.0, seed=1)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(7)
    assert write(policy, PROMPTS, users, temperature=1.0, seed=1) == one
    assert write(policy, PROMPTS, users, temperature=1.0, seed=2) != one


@pytest.mark.slow
def test_sampling() -> None:
    policy, users = make_policy(), user_batch(*USERS)

    def sample(seed: int, **options: Any) -> list[str]:
        torch.manual_seed(seed)
        return write(policy, PROMPTS, users, **{"temperature": 1.0, **options})

    greedy = write(policy, PROMPTS, users)
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1, top_p=1e-6) == greedy  # a nucleus of one token
    assert sample(1, temperature=1e-4) == greedy
    assert sample(1) != greedy


def test_sampling_is_from_the_whole_vocabulary() -> None:
    # A random model is nearly uniform; transformers' own default would keep the best 50 of 97.
    policy = make_policy()
    prompts, users = [PROMPTS[0]] * 700, user_batch(*[1] * 700)
    texts = write(policy, prompts, users, temperature=3.0, max_new_tokens=1, batch_size=700)
    assert len(set(texts)) > 90


def test_leaves_the_model_as_it_was() -> None:
    policy = make_policy().train()
    trainable = [value.requires_grad for value in policy.parameters()]
    for users in (user_batch(1), None):
        write(policy, PROMPTS[:1], users)
        assert policy.training and policy.backbone.model.training
        assert trainable == [value.requires_grad for value in policy.parameters()]


def test_nothing_to_write() -> None:
    assert write(make_policy(), [], user_batch()) == []


BAD = [
    (
        {"temperature": -0.5},
        "eval.temperature=-0.5 is not allowed: expected a number from 0. Set eval.temperature=1.",
    ),
    (
        {"temperature": float("inf")},
        "eval.temperature=inf is not allowed: expected a number from 0. Set eval.temperature=1.",
    ),
    (
        {"top_p": 0.0},
        "eval.top_p=0.0 is not allowed: expected a number above 0, at most 1. Set eval.top_p=1.",
    ),
    (
        {"top_p": 1.5},
        "eval.top_p=1.5 is not allowed: expected a number above 0, at most 1. Set eval.top_p=1.",
    ),
    (
        {"max_new_tokens": 0},
        "eval.max_new_tokens=0 is not allowed: expected a whole number from 1. "
        "Set eval.max_new_tokens=1.",
    ),
    (  # 128 positions, 5 of them for the user, 8 for the longest prompt
        {"max_new_tokens": 116},
        "eval.max_new_tokens=116 is not allowed: expected at most 115, as a prompt takes 8 of "
        "123 positions. Set a smaller eval.max_new_tokens or data.max_prompt_tokens.",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    policy = make_policy(aggregator=ConcatSoftPrompt(hidden_size=WIDTH, n_tokens=5))
    with pytest.raises(ValueError) as caught:
        write(policy, PROMPTS, user_batch(*USERS), **options)
    assert str(caught.value) == message


@pytest.mark.slow
def test_all_positions_can_be_written() -> None:
    policy = make_policy(aggregator=ConcatSoftPrompt(hidden_size=WIDTH, n_tokens=5))
    (text,) = write(policy, [PROMPTS[0]], user_batch(1), max_new_tokens=123 - len(PROMPTS[0]))
    assert len(text.split()) == 123 - len(PROMPTS[0])
