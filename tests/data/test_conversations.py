"""Rows whose prompts are turns of conversations: splits, history, what is said of users, shared tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pair_data import ListSource, make_data
from tiny import LORA, gradients, language_model, make_model, perturb

from plrhf.backbone.model import Backbone
from plrhf.core.errors import BadValue
from plrhf.data.module import PreferenceData
from plrhf.data.samplers import PairSampler
from plrhf.models.reward import PersonalRewardModel

TAGS = ["<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content if m.role == 'user' or loop.last else m.content | replace('sea', '') }}",
)
"""ChatML that writes former replies otherwise than the last one, as templates of reasoning models do."""


def turns(name: str, n_turns: int, *, user: str = "ann", opening: str = "", **more: Any) -> Any:
    """A pair at each turn of a conversation, and a second one at the first turn."""
    prompt: list[Any] = []
    for turn in range(n_turns):
        asked = opening if turn == 0 and opening else f"write {name} {turn}"
        prompt = [*prompt, {"role": "user", "content": asked}]
        chosen = f"the sea is blue {turn} {name}"
        for n in range(2 if turn == 0 else 1):
            row = {"prompt": prompt, "chosen": chosen, "rejected": f"boats {turn + n} {name}"}
            yield {**row, "user_id": user, "conversation_id": name, **more}
        prompt = [*prompt, {"role": "assistant", "content": chosen}]


@pytest.fixture(scope="module")
def tagged(tokenizer: Any) -> Any:
    tagged = copy.deepcopy(tokenizer)
    tagged.add_special_tokens({"additional_special_tokens": TAGS})
    tagged.chat_template = CHATML
    return tagged


def data_of(tokenizer: Any, records: list[Any], **more: Any) -> Any:
    return make_data(tokenizer, records=records, **more)


def test_splits_share_neither_conversations_nor_prompts() -> None:
    records = [
        row for n in range(60) for row in turns(f"c{n}", 2, opening="hello" if n % 3 == 0 else "")
    ]
    data = PreferenceData(
        source=ListSource(records=records), seed=3, batch_size=4, eval_batch_size=4
    )
    found = {name: list(getattr(data.splits, name)) for name in ("train", "val", "test")}
    for get in (lambda row: row.conversation_id, lambda row: str(row.prompt)):
        sets = [{get(row) for row in rows} for rows in found.values()]
        assert all(len(one) > 0 for one in sets)
        assert sum(map(len, sets)) == len(set.union(*sets))
    in_test = {row.conversation_id for row in found["test"]}
    hello = [row for rows in found.values() for row in rows if row.prompt[0]["content"] == "hello"]
    openings = [row for row in hello if len(row.prompt) == 1]
    # Openings that test has too are left out elsewhere; the turns behind them have prompts of their own.
    assert {row.conversation_id for row in openings} < in_test
    n_hello = sum(int(name[1:]) % 3 == 0 for name in in_test)
    assert data.splits.dropped == {
        "prompt in a later split too, of another conversation": 2 * (20 - n_hello)
    }
    by_conversation = PreferenceData(
        source=ListSource(records=records),
        **{"seed": 3, "batch_size": 4, "eval_batch_size": 4, "split_by": "conversation"},
    )
    assert by_conversation.splits.dropped == {}
    assert {row.conversation_id for row in by_conversation.splits.test} == in_test


def test_what_would_divide_a_conversation_is_refused() -> None:
    how: dict[str, Any] = {"seed": 3, "batch_size": 4, "eval_batch_size": 4}
    records = [*turns("a", 1, split="train"), *turns("b", 2, split="test")]
    records[-1]["split"] = "train"
    with pytest.raises(BadValue, match=r"conversation_id='b in test and train' is not allowed"):
        PreferenceData(source=ListSource(records=records), **how)
    without = [*turns("a", 3), *turns("b", 3)]
    with pytest.raises(BadValue, match=r"expected prompt or conversation where rows have a conv"):
        PreferenceData(source=ListSource(records=without), split_by="response", **how)


def test_the_last_turns_and_what_is_said_of_a_user(tagged: Any) -> None:
    said = {"user_text": "I sail.", "user_features": {"sea": "north", "age": 40}}
    records = [*turns("a", 3, split="train", **said), *turns("b", 1, split="test", **said)]
    options = {"history_turns": 2, "use_user_text": True, "use_user_features": True}
    data = data_of(tagged, records, **options)
    *_, last = data.datasets["train"].pairs
    assert tagged.decode(last.prompt) == (
        "<|im_start|>system\nI sail.\nage: 40\nsea: north<|im_end|>\n"
        "<|im_start|>user\nwrite a 1<|im_end|>\n"
        "<|im_start|>assistant\nthe sea is blue 1 a<|im_end|>\n"
        "<|im_start|>user\nwrite a 2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert data.truncated["earlier turns left out"] == 1
    assert data.truncated["turn computed apart"] == 1
    assert any("earlier turns left out: 1 of 6" in one for one in data.tokenizing_notes())
    plain = [{**row, "prompt": row["prompt"][0]["content"]} for row in records]
    data = data_of(tagged, plain, use_user_features=True)
    first = data.datasets["train"].pairs[0]
    assert tagged.decode(first.prompt) == "<|endoftext|>age: 40\nsea: north\nwrite a 0\n"


@pytest.mark.slow
@pytest.mark.parametrize(("template", "n_apart"), [(CHATML, 0), (FORGETFUL, 7)])
def test_turns_share_tokens_and_equal_separate_rows(
    tagged: Any, template: str, n_apart: int
) -> None:
    tagged = copy.deepcopy(tagged)
    tagged.chat_template = template
    records = [*turns("a", 8, split="train"), *turns("b", 1, split="test")]
    data = data_of(tagged, records, batch_size=9)
    train = data.datasets["train"]
    assert data.truncated["turn computed apart"] == n_apart
    (batch,) = data.train_dataloader()
    assert sorted(batch.row.tolist()) == list(range(9))
    n_separate = int((batch.segment != -1).sum())
    if n_apart == 0:  # the tree is the last turn's row, and the rejected replies, which begin alike
        *_, last = train.pairs
        assert len(batch.packing.source) <= len(last.prompt) + len(last.chosen) + sum(
            len(one.rejected) for one in train.pairs
        )
        assert n_separate / len(batch.packing.source) > 3
    assert len(batch.packing.source) < n_separate

    shape = language_model("llama", vocabulary=len(tagged), positions=512)
    backbone = Backbone(model=shape, trainable="lora", lora=LORA)
    perturb(backbone, "lora_B")
    model = make_model(PersonalRewardModel, aggregator="film_last", backbone=backbone)
    train.groups, train.feedback = None, None
    (apart,) = [train.batch(batch.row.tolist())]
    results = []
    for one in (batch, apart):
        model.zero_grad()
        loss, _ = model.loss(one)
        loss.sum().backward()
        results.append((loss.detach(), {k: v.clone() for k, v in gradients(model).items()}))
    (loss, grads), (expected, expected_grads) = results
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    assert len(grads) > 0 and grads.keys() == expected_grads.keys()
    for name, one in grads.items():
        torch.testing.assert_close(one, expected_grads[name], atol=1e-5, rtol=0)


def test_turns_are_together_only_where_tokens_are_shared(tagged: Any) -> None:
    records = [*turns("a", 3, split="train"), *turns("a2", 3, user="bob", split="train")]
    records += turns("b", 1, split="test")
    data = data_of(tagged, records)
    assert data.datasets["train"].groups.number.tolist() == [0] * 4 + [1] * 4
    # The two pairs of a turn are choices of their own, as they have no group_id.
    assert data.datasets["train"].feedback is None
    by_tokens = data_of(tagged, records, batch_tokens=300)
    assert isinstance(by_tokens.train_dataloader().sampler, PairSampler)
    data.precompute_hidden(lambda batch: torch.zeros(len(batch), 2, 4))
    assert data.datasets["train"].groups is None
