"""Rows as batches: numbering, order and its resumption, counts, what is computed beforehand."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from math import isnan
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from tiny import WIDTH, assert_same, gradients, make_backbone, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn, tensor
from transformers import PreTrainedTokenizerFast

from plrhf.aggregators import FiLM
from plrhf.backbone.model import Backbone
from plrhf.backbone.tiny import tiny_gptj
from plrhf.core.types import CHOSEN, REJECTED
from plrhf.data.dataset import RankShard
from plrhf.data.module import PreferenceData
from plrhf.data.packing import TokenPair
from plrhf.data.parsing import parse_row
from plrhf.data.rows import Rows
from plrhf.data.samplers import PairSampler, length_buckets
from plrhf.data.sources.base import Source
from plrhf.data.splits import all_as_test
from plrhf.data.text_values import distinct_texts, texts_as_pairs
from plrhf.encoders import LookupEncoder
from plrhf.models.optim import Optim
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel

SENTENCE = "write about the sea is blue wide and calm boats sail far away home ."
WORDS = SENTENCE.split()


def record(number: int, user: str, split: str, **more: Any) -> dict[str, Any]:
    """A row whose texts differ in length with its number."""
    return {
        "prompt": " ".join(WORDS[: 3 + number % 4]),
        "chosen": " ".join(WORDS[number % 5 : number % 5 + 1 + number % 7]),
        "rejected": " ".join(WORDS[7 : 9 + number % 3]) + " .",
        "user_id": user,
        "pair_id": f"{split}{number}",
        "split": split,
        **more,
    }


FEATURES = {"cat": {"age": 20, "sea": "north"}, "ann": {"age": 40, "sea": "south"}, "bob": {}}
RECORDS = [
    *(record(i, ("cat", "ann", "bob")[i % 3], "train") for i in range(17)),
    *(record(i, ("cat", "ann")[i % 2], "val") for i in range(5)),
    *(record(i, ("zoe", "bob", "ann")[i % 3], "test") for i in range(7)),
]
for one in RECORDS:
    one["user_features"] = FEATURES.get(one["user_id"], {"age": 30, "sea": "west"})


class ListSource(Source):
    def __init__(self, *, records: Any = RECORDS) -> None:
        self.rows = records

    def records(self) -> Iterator[Any]:
        return ((f"list:{number}", one) for number, one in enumerate(self.rows, 1))


def make_data(tokenizer: Any, *, records: Any = RECORDS, causal: bool = True, **more: Any) -> Any:
    settings = {"seed": 3, "batch_size": 4, "eval_batch_size": 3, **more}
    data = PreferenceData(source=ListSource(records=records), **settings)
    data.tokenize(tokenizer, layout="packed" if causal else "two_rows")
    return data


def served(loader: Any) -> list[list[int]]:
    return [batch.row.tolist() for batch in loader]


def test_users_are_numbered_from_1_and_others_are_generic(tokenizer: Any) -> None:
    data = make_data(tokenizer)
    assert data.splits.users == ("ann", "bob", "cat") and data.n_users == 3
    assert data.datasets["train"].user_id[:4].tolist() == [3, 1, 2, 3]
    assert data.datasets["test"].user_id[:4].tolist() == [0, 2, 1, 0]  # zoe was never seen
    assert data.unseen_users() == {"zoe"}


def test_features_are_in_units_of_the_train_users(tokenizer: Any) -> None:
    data = make_data(tokenizer)
    # Ages 20 and 40: mean 30, deviation 10. Codes by name: north 0, south 1; west is unknown.
    assert data.datasets["train"].features[:2].tolist() == [[-1.0, 0.0], [1.0, 1.0]]
    assert data.datasets["train"].features[2].isnan().all()
    age, sea = data.datasets["test"].features[0].tolist()
    assert age == 0.0 and isnan(sea)


def test_a_batch_holds_what_belongs_together(tokenizer: Any) -> None:
    data = make_data(tokenizer)
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == 4
    for place, row in enumerate(batch.row.tolist()):
        source = RECORDS[row]
        texts = [
            tokenizer.decode(batch.input_ids[place][batch.segment[place] == mark])
            for mark in (0, 1, 2)
        ]
        assert texts == [
            f"<|endoftext|>{source['prompt']}\n",
            f"{source['chosen']}<|endoftext|>",
            f"{source['rejected']}<|endoftext|>",
        ]
        assert batch.user_id[place] == data.user_index[source["user_id"]]


def test_order_is_fixed_by_seed_and_epoch(tokenizer: Any) -> None:
    def epochs(**settings: Any) -> list[list[list[int]]]:
        loader = make_data(tokenizer, **settings).train_dataloader()
        return [served(loader) for _ in range(3)]

    first = epochs()
    assert first == epochs()
    assert first != epochs(seed=4)
    for epoch in first:
        assert [len(batch) for batch in epoch] == [4, 4, 4, 4, 1]
        assert sorted(row for batch in epoch for row in batch) == list(range(17))
    assert first[0] != first[1] != first[2]


@pytest.mark.parametrize("batch_tokens", [None, 150])
@pytest.mark.parametrize("n_before", [0, 1, 4, 5, 7, 10])
def test_order_goes_on_where_it_stopped(
    tokenizer: Any, n_before: int, batch_tokens: int | None
) -> None:
    def batches(loader: Any) -> Iterator[list[int]]:
        while True:
            yield from served_lazily(loader)

    def served_lazily(loader: Any) -> Iterator[list[int]]:
        for batch in loader:
            yield batch.row.tolist()

    data = make_data(tokenizer, batch_tokens=batch_tokens)
    whole = batches(data.train_dataloader())
    expected = [next(whole) for _ in range(n_before + 7)]

    stopped = data.train_dataloader()
    begun = batches(stopped)
    assert [next(begun) for _ in range(n_before)] == expected[:n_before]
    resumed = make_data(tokenizer, batch_tokens=batch_tokens).train_dataloader()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    rest = batches(resumed)
    assert [next(rest) for _ in range(7)] == expected[n_before:]


def test_an_iterator_left_at_its_last_batch_starts_the_next_epoch() -> None:
    # Lightning knows how many batches there are and asks for no more.
    lengths = np.ones((7, 1), dtype=np.int64)
    left, exhausted = (PairSampler(lengths, batch_size=3, seed=0) for _ in range(2))
    iterator = iter(left)
    assert [next(iterator) for _ in range(3)] == list(exhausted)
    assert list(left) == list(exhausted)


def test_classes_of_like_length_by_hand() -> None:
    lengths = np.array([10, 100, 95, 11, 50, 90, 10])
    bucket, sizes = length_buckets(lengths, 3, 200)
    # 100 to 90, in twos; 50 and what it takes to fill a batch of three; the last 10.
    assert bucket.tolist() == [1, 0, 0, 1, 1, 0, 2]
    assert sizes == [2, 3, 3]
    of_none, sizes = length_buckets(lengths[:0], 3, 200)
    assert len(of_none) == 0 and sizes == [3]
    assert length_buckets(lengths[1:2], 3, 99)[1] == [1]  # too long for the budget: alone


@pytest.mark.parametrize("rows_a_pair", [1, 2])
def test_batches_keep_to_a_budget_of_tokens(rows_a_pair: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 60, size=(1009, rows_a_pair))
    batches = PairSampler(lengths, batch_size=9, seed=2, batch_tokens=130 * rows_a_pair)
    epochs = [list(batches) for _ in range(3)]
    assert len(batches) == len(epochs[0]) == len(epochs[1]) == len(epochs[2])
    seen_together = set()
    for epoch in epochs:
        assert sorted(place for places, *_ in epoch for place in places) == list(range(1009))
        longest = [lengths[places].max() for places, *_ in epoch]
        assert all(len(p) * most <= 130 for (p, *_), most in zip(epoch, longest, strict=True))
        assert max(len(places) for places, *_ in epoch) == 9
        assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2  # lengths are mixed
        seen_together |= {tuple(sorted(places)) for places, *_ in epoch}
    assert len(seen_together) > 2.8 * len(batches)  # and so is who stands with whom
    at_random = PairSampler(lengths, batch_size=9, seed=2)
    share, more = batches.padding(), at_random.padding()
    assert share is not None and more is not None
    assert (share < 0.1 if rows_a_pair == 1 else share < 0.3) and more > share + 0.1


def test_padding_by_hand() -> None:
    def padding(lengths: list[list[int]]) -> float | None:
        table = np.array(lengths, dtype=np.int64).reshape(len(lengths), -1)
        return PairSampler(table, batch_size=3, seed=0).padding()

    assert padding([[4], [4], [2]]) == pytest.approx(2 / 12)
    assert padding([[3, 4], [2, 2]]) == pytest.approx(5 / 16)
    assert PairSampler(np.empty((0, 1), np.int64), batch_size=3, seed=0).padding() is None


def test_padding_is_what_batches_hold(tokenizer: Any, word_tokenizer: Any) -> None:
    for causal, kind in ((True, tokenizer), (False, word_tokenizer)):
        for batch_tokens in (None, 120):
            data = make_data(kind, causal=causal, batch_tokens=batch_tokens)
            segments = [batch.segment for batch in data.train_dataloader()]
            n_padding = sum(int((one == -1).sum()) for one in segments)
            share = n_padding / sum(one.numel() for one in segments)
            assert data.padding() == pytest.approx(share) and share > 0
    assert make_data(tokenizer, users=("ann",), schema=data.schema).padding() is None


def test_summed_batches_weigh_pairs_alike(tokenizer: Any) -> None:
    data = make_data(tokenizer)  # 17 rows in fours: steps of 4 + 4, 4 + 4 and 1
    data.set_shard(RankShard(accumulated_batches=2))
    assert [batch.step_weight for batch in data.train_dataloader()] == [1, 1, 1, 1, 2]
    data.set_shard(RankShard(accumulated_batches=3))  # 4 + 4 + 4 and 4 + 1
    weights = [batch.step_weight for batch in data.train_dataloader()]
    assert weights == pytest.approx([1, 1, 1, 3 * 4 / 5, 3 * 1 / 5])
    assert all(batch.step_weight == 1 for batch in data.evaluation_loader("train"))


@pytest.mark.parametrize("batch_tokens", [None, 150])
def test_gradients_are_of_the_mean_over_the_steps_pairs(
    tokenizer: Any, batch_tokens: int | None
) -> None:
    accumulated_batches = 4  # 5 or 6 batches: the last step is short
    data = make_data(tokenizer, batch_tokens=batch_tokens)
    backbone = make_backbone()
    backbone.model.resize_token_embeddings(len(tokenizer))
    model = make_model(PersonalRewardModel, backbone=backbone)
    model.log = lambda *_, **__: None
    data.set_shard(RankShard(accumulated_batches=accumulated_batches))
    batches = list(data.train_dataloader())
    assert len({len(batch) for batch in batches}) > 1 and len(batches) % accumulated_batches != 0
    for start in range(0, len(batches), accumulated_batches):
        of_step = batches[start : start + accumulated_batches]
        model.zero_grad()
        for batch in of_step:
            (model.training_step(batch, 0) / accumulated_batches).backward()  # as Lightning sums
        found = gradients(model)
        found = {name: value.clone() for name, value in found.items()}
        model.zero_grad()
        rows = torch.cat([batch.row for batch in of_step]).tolist()
        model.loss(data.datasets["train"].batch(rows))[0].mean().backward()
        assert_same(found, gradients(model), atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_every_batch(world_size: int, tokenizer: Any) -> None:
    whole = make_data(tokenizer)  # 17 train rows in fours, so the last batch is of one
    shares = []
    for rank in range(world_size):
        data = make_data(tokenizer)
        data.set_shard(RankShard(rank, world_size))
        shares.append(data)
    for name in ("train", "test"):
        loaders = [
            one.train_dataloader() if name == "train" else one.evaluation_loader("test")
            for one in (whole, *shares)
        ]
        for batch, *parts in zip(*loaders, strict=True):
            counted = [row for part in parts for row in part.row[part.counted()].tolist()]
            assert sorted(counted) == sorted(batch.row.tolist())  # each once, none twice
            assert all(len(part) > 0 for part in parts)
            mean = sum(part.mean(part.row.double()) for part in parts) / world_size
            torch.testing.assert_close(mean, batch.mean(batch.row.double()))


def test_values_are_collected_over_processes(tokenizer: Any) -> None:
    found = []
    for rank in range(2):
        data = make_data(tokenizer)
        data.set_shard(RankShard(rank, 2))
        found.append(data.values_per_pair("test", lambda batch: 1 + batch.row[:, None].float()))
    assert sum(found).squeeze(1).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert all((one == 0).any() for one in found)


def test_loaders_leave_the_global_generator_alone(tokenizer: Any) -> None:
    data = make_data(tokenizer)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.evaluation_loader("test")):
        served(loader)
    assert torch.get_rng_state().equal(before)


def test_evaluation_goes_through_all_rows_longest_first(tokenizer: Any) -> None:
    data = make_data(tokenizer)
    for split, n_rows in (("train", 17), ("val", 5), ("test", 7)):
        order = [row for batch in served(data.evaluation_loader(split)) for row in batch]
        assert sorted(order) == list(range(n_rows))
        pairs = data.datasets[split].pairs
        lengths = [
            len(pairs[i].prompt) + len(pairs[i].chosen) + len(pairs[i].rejected) for i in order
        ]
        assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1
    assert served(data.val_dataloader()) == served(data.evaluation_loader("val"))


def test_a_part_holds_nothing_of_other_splits(tokenizer: Any) -> None:
    data = make_data(tokenizer)
    part = data.restrict_to("train", "val")
    assert served(part.train_dataloader()) == served(data.train_dataloader())
    assert served(part.val_dataloader()) == served(data.val_dataloader())
    message = "^test pairs are closed here: only train, val may be looked at while"
    with pytest.raises(LookupError, match=message):
        part.datasets["test"]
    with pytest.raises(LookupError, match=message):
        part.evaluation_loader("test")
    with pytest.raises(LookupError, match=message):
        part.restrict_to("test")
    assert not {"splits", "source"} & vars(part).keys()
    held = pickle.dumps(part)  # with all that it leads to
    for split, is_held in (("train", True), ("val", True), ("test", False)):
        found = {one["pair_id"].encode() in held for one in RECORDS if one["split"] == split}
        assert found == {is_held}, split


def test_the_content_hash_tells_rows_and_splits_apart() -> None:
    def data(records: Any) -> PreferenceData:
        return PreferenceData(
            source=ListSource(records=records), seed=3, batch_size=4, eval_batch_size=3
        )

    one = data(RECORDS)
    assert one.content_hash() == data(list(RECORDS)).content_hash()
    swapped = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        if row["split"] == "test"
        else row
        for row in RECORDS
    ]
    other = data(swapped)
    assert one.content_hash() != other.content_hash()
    assert one.splits.content_hash("train") == other.splits.content_hash("train")
    assert one.splits.content_hash("test") != other.splits.content_hash("test")
    moved = [*RECORDS[:16], {**RECORDS[16], "split": "val"}, *RECORDS[17:]]
    assert one.content_hash() != data(moved).content_hash()


def long_record(number: int, user: str, split: str, **more: Any) -> dict[str, Any]:
    return record(number, user, split, pair_id=f"long-{split}{number}", **more) | {
        "chosen": "far away home " * 60
    }


MIXED = [
    *(record(i, "ann", "train") for i in range(9)),
    *(record(i + 20, "bob", "train") for i in range(2)),
    *(long_record(i, "bob", "train") for i in range(7)),  # who has two left
    *(long_record(i + 10, "cat", "train") for i in range(5)),  # who has none left
    *(record(i, "ann", "val") for i in range(2)),
    long_record(3, "ann", "val"),
    *(record(i + 40, user, "test") for i, user in enumerate(["ann", "bob", "cat"] * 4)),
    long_record(7, "ann", "test"),
    record(61, "dan", "val"),
    *(record(i + 60, "dan", "test") for i in range(3)),
]


def test_users_are_counted_over_the_rows_that_fit(tokenizer: Any) -> None:
    settings = {"records": MIXED, "min_pairs_per_user": 3, "max_tokens": 90}
    data = make_data(tokenizer, **settings)
    assert data.splits.users == ("ann",) and data.user_index == {"ann": 1} and data.n_users == 1
    users = {
        split: Counter(row.user_id for row in data.datasets[split].rows)
        for split in ("train", "val", "test")
    }
    # cat has no train row left, and is unseen.
    assert users == {"train": {"ann": 9}, "val": {"ann": 2}, "test": {"ann": 4, "cat": 4, "dan": 3}}
    assert data.unseen_users() == {"cat", "dan"}
    for split in users:
        assert list(data.datasets[split].rows) == list(getattr(data.splits, split))
        for row, pair in zip(data.datasets[split].rows, data.datasets[split].pairs, strict=True):
            chosen = tokenizer(row.chosen)["input_ids"]
            assert list(pair.chosen[:-1]) == chosen  # tokens are still those of the row
    counts = data.counts()
    assert counts["truncated"]["response too long"] == 7 + 5 + 1 + 1
    assert counts["dropped"] == {
        "user below data.min_pairs_per_user": 2 + 4,
        "unseen user outside test": 1,
    }
    kept = sum(counts["rows"].values())
    assert kept + 14 + sum(counts["dropped"].values()) == counts["read"] == len(MIXED)
    again = make_data(tokenizer, **settings)
    again.tokenize(tokenizer, layout="packed")
    assert again.counts() == counts


def test_the_largest_number_of_users_is_of_those_whose_rows_fit(tokenizer: Any) -> None:
    records = [
        *(record(i, "ann", "train") for i in range(3)),
        *(long_record(i, "bob", "train") for i in range(5)),
        record(40, "bob", "train"),
        *(record(i, user, "test") for i, user in enumerate(["ann", "bob"])),
    ]
    data = make_data(tokenizer, records=records, max_users=1, max_tokens=90)
    assert data.splits.users == ("ann",)


def test_unseen_users_are_counted_over_the_rows_that_fit(tokenizer: Any) -> None:
    records = [
        *(record(i, f"u{i % 20}", "train") for i in range(60)),
        *(record(i, f"u{i % 20}", "test") for i in range(40)),
    ]
    whole = make_data(tokenizer, records=records, unseen_fraction=0.4, min_pairs_per_user=3)
    light = sorted(whole.unseen_users())[0]
    cut = [
        long_record(i, light, "train")
        if (one["user_id"], one["split"]) == (light, "train") and i < 20
        else one
        for i, one in enumerate(records)
    ]
    settings = {"unseen_fraction": 0.4, "min_pairs_per_user": 3, "max_tokens": 90}
    data = make_data(tokenizer, records=cut, **settings)
    assert data.unseen_users() == whole.unseen_users() - {light}  # two pairs are too few for all
    assert data.splits.users == whole.splits.users


def test_prompts_are_counted_as_truncated_where_their_rows_are_used(tokenizer: Any) -> None:
    long_prompt = {"prompt": "write about the sea " * 20}
    records = [
        *(record(i, "ann", "train") for i in range(3)),
        record(3, "ann", "train", **long_prompt),
        long_record(4, "ann", "train", **long_prompt),
        record(5, "ann", "test", **long_prompt),
        record(6, "low", "test", **long_prompt),
    ]
    settings = {"max_tokens": 90, "max_prompt_tokens": 30, "min_pairs_per_user": 2}
    data = make_data(tokenizer, records=records, **settings)
    assert data.counts()["truncated"]["prompt truncated"] == 2
    assert data.counts()["truncated"]["response too long"] == 1
    assert data.counts()["dropped"] == {"user below data.min_pairs_per_user": 1}


def test_shuffled_users_bring_their_own_text_to_other_rows(tokenizer: Any) -> None:
    texts = {"ann": "I like the sea", "bob": "boats " * 30, "cat": "calm"}
    records = [
        *(record(i, "abc"[i % 3], "train") for i in range(12)),
        *(record(i, "abc"[i % 3], "test") for i in range(3)),
    ]
    for one in records:
        one["user_id"] = {"a": "ann", "b": "bob", "c": "cat"}[one["user_id"]]
        one["user_text"] = texts[one["user_id"]]
    settings = {"use_user_text": True, "shuffle_users": True, "max_tokens": 90}
    data = make_data(tokenizer, records=records, **settings)
    dataset = data.datasets["train"]
    assert 0 < len(dataset) <= 12
    for row, pair in zip(dataset.rows, dataset.pairs, strict=True):
        text = f"{texts[row.user_id]}\n{row.prompt}\n"
        assert list(pair.prompt[1:]) == tokenizer(text)["input_ids"]
        assert pair.longest <= 90
    counts = data.counts()
    n_dropped = counts["truncated"]["response too long"] + sum(counts["dropped"].values())
    assert sum(counts["rows"].values()) + n_dropped == 15


def test_the_content_hash_is_the_same_before_and_after_tokenising(tokenizer: Any) -> None:
    settings = {"seed": 3, "batch_size": 4, "eval_batch_size": 3, "max_tokens": 90}
    data = PreferenceData(source=ListSource(records=MIXED), **settings)
    before = data.content_hash()
    data.tokenize(tokenizer, layout="packed")
    after = make_data(tokenizer, records=MIXED, max_tokens=90).content_hash()
    assert before == data.content_hash() == after


def test_users_can_be_numbered_as_a_model_knows_them_now(tokenizer: Any) -> None:
    data = make_data(tokenizer)
    data.set_known_users(["cat", "zoe", "bob"])  # ann was forgotten, zoe enrolled
    assert data.datasets["train"].user_id[:4].tolist() == [1, 0, 3, 1]
    assert data.datasets["test"].user_id[:3].tolist() == [2, 3, 0]
    assert data.unseen_users() == {"ann"} and data.n_users == 3


def test_fractions_are_refused_where_rows_carry_a_split(tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^data\.val_fraction=0\.3 .*null where rows carry a split"
    ):
        make_data(tokenizer, val_fraction=0.3)

    class Dividing(ListSource):
        val_fraction = 0.3  # by which it has divided its rows

    data = PreferenceData(
        source=Dividing(), seed=3, batch_size=4, eval_batch_size=3, val_fraction=0.3
    )
    assert len(data.splits.val) == 5


def test_shuffled_users_keep_their_number_of_rows_but_not_their_choices(tokenizer: Any) -> None:
    true, control = make_data(tokenizer), make_data(tokenizer, shuffle_users=True)
    for split in ("train", "val"):
        ours, theirs = true.datasets[split], control.datasets[split]
        assert ours.pairs == theirs.pairs
        assert Counter(ours.user_id.tolist()) == Counter(theirs.user_id.tolist())
        assert not ours.user_id.equal(theirs.user_id)
    for row in control.datasets["train"].rows:
        expected = FEATURES[row.user_id] or None
        assert row.user_features == expected  # features move with their user
    assert true.datasets["test"].user_id.equal(control.datasets["test"].user_id)
    assert true.splits.users == control.splits.users


def test_counts_add_up_to_the_rows_read(tokenizer: Any) -> None:
    records = [
        *RECORDS,
        {**record(90, "ann", "train"), "chosen": ""},
        {**record(91, "ann", "train"), "rejected": ["a"]},
        record(92, "eve", "train"),  # one train pair is too few
        {**record(93, "ann", "test"), "chosen": " ".join(WORDS * 8)},
        {**record(94, "ann", "train"), "prompt": " ".join(WORDS * 3)},
    ]
    data = make_data(
        tokenizer, records=records, min_pairs_per_user=2, max_prompt_tokens=40, max_tokens=150
    )
    counts = data.counts()
    assert 0 < counts.pop("padding") < 0.5
    assert counts == {
        "read": 34,
        "refused": {"empty response": 1, "field that is not text": 1},
        "dropped": {"user below data.min_pairs_per_user": 1},
        "truncated": {"prompt truncated": 1, "response truncated": 0, "response too long": 1},
        "rows": {"train": 18, "val": 5, "test": 7},
        "users": {"seen": 3, "unseen": 1},
    }
    assert 34 == 2 + 1 + 1 + (18 + 5 + 7)  # read = refused + dropped + too long + rows
    assert data.tokenizing_notes() == [
        "response too long: 1 of 31 rows (3%); dropped; raise data.max_tokens or set "
        "data.on_long_response=truncate",
        "prompt truncated: 1 of 31 rows (3%); raise data.max_prompt_tokens to keep them whole",
    ]
    assert make_data(tokenizer).tokenizing_notes() == []


def test_other_rows_for_a_trained_model(tokenizer: Any) -> None:
    trained = make_data(tokenizer)
    others = [record(i, ("bob", "max")[i % 2], "test") for i in range(4)]
    data = make_data(
        tokenizer,
        records=[*others, record(9, "bob", "train")],
        users=trained.splits.users,
        schema=trained.schema,
    )
    assert [len(data.datasets[split]) for split in ("train", "val", "test")] == [0, 0, 4]
    assert data.datasets["test"].user_id.tolist() == [2, 0, 2, 0]
    assert data.datasets["test"].features.shape == (4, 2)
    assert data.counts()["dropped"] == {"row outside test": 1}
    without = [{k: v for k, v in one.items() if k != "split"} for one in others]
    data = make_data(tokenizer, records=without, users=trained.splits.users, schema=trained.schema)
    assert len(data.datasets["test"]) == 4 and data.counts()["dropped"] == {}


def reward_model(tokenizer: Any, **film: Any) -> Any:
    model = tiny_gptj(
        vocab_size=len(tokenizer),
        n_layers=2,
        width=WIDTH,
        n_heads=4,
        max_positions=256,
        eos_token_id=0,
    )
    aggregator = FiLM(hidden_size=WIDTH, n_blocks=2, **film)
    nn.init.normal_(aggregator.to_film.weight, std=0.2)
    return make_model(
        PersonalRewardModel,
        backbone=Backbone(model=model, trainable="frozen"),
        aggregator=aggregator,
    ).eval()


def margins(model: Any, data: Any, split: str) -> dict[str, Tensor]:
    found = {name: torch.zeros(len(data.datasets[split])) for name in ("user", "generic")}
    for batch in data.evaluation_loader(split):
        for name, values in model.context_margins(batch).items():
            found[name][batch.row] = values
    return found


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("film", [{}, {"layer_width": 9, "user_dim": WIDTH}])
def test_hidden_states_computed_beforehand_change_nothing(
    tokenizer: Any, film: Any, pooling: str
) -> None:
    model, data = reward_model(tokenizer, **film), make_data(tokenizer)
    model.pooling = pooling
    assert model.pooled_suffices
    online = {split: margins(model, data, split) for split in data.datasets}
    seen: list[int] = []

    @torch.no_grad()
    def pool(batch: Any) -> Tensor:
        responses = [(batch.segment == mark).any(dim=1).sum() for mark in (CHOSEN, REJECTED)]
        seen.append(int(sum(responses)))
        return model.pooled_trunk(batch)

    data.precompute_hidden(pool)
    distinct = [
        {(pair.prompt, text) for pair in dataset.pairs for text in (pair.chosen, pair.rejected)}
        for dataset in data.datasets.values()
    ]
    assert sum(seen) == sum(map(len, distinct)) < 2 * (17 + 5 + 7)  # each text once
    model.backbone.forward = None  # the trunk is not needed any more
    for split, expected in online.items():
        found = margins(model, data, split)
        for context in ("user", "generic"):
            assert expected[context].std() > 0.01
            torch.testing.assert_close(found[context], expected[context], atol=1e-5, rtol=0)
    batch = next(iter(data.train_dataloader()))
    assert model.loss(batch)[0].shape == (4,)


@pytest.mark.parametrize(
    ("trainable", "site", "suffices"),
    [("frozen", "last", True), ("lora", "last", False), ("frozen", "every_block", False)],
)
def test_when_hidden_states_can_be_computed_beforehand(
    trainable: Any, site: Any, suffices: bool
) -> None:
    model = make_model(
        PersonalRewardModel,
        backbone=make_backbone(trainable=trainable),
        aggregator=FiLM(hidden_size=WIDTH, n_blocks=3, site=site),
    )
    assert model.pooled_suffices == suffices


def test_reference_computed_beforehand_changes_nothing(tokenizer: Any) -> None:
    data = make_data(tokenizer)
    backbone = make_backbone()
    backbone.model.resize_token_embeddings(len(tokenizer))
    policy = make_model(PersonalDPOPolicy, backbone=backbone)
    online = {batch.row: policy.loss(batch)[0] for batch in data.evaluation_loader("train")}
    data.precompute_reference(policy.reference_logps)
    policy.backbone.reference = None  # nor is it asked again
    for (row, expected), batch in zip(online.items(), data.evaluation_loader("train"), strict=True):
        assert batch.row.equal(row)
        torch.testing.assert_close(policy.loss(batch)[0], expected, atol=1e-5, rtol=0)
    assert data.datasets["val"].ref_logps[torch.arange(5)].shape == (5, 2)


@pytest.fixture(scope="module")
def word_tokenizer() -> Any:
    """A BERT-like tokenizer: no end token, but [CLS] and [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def bert_reward_model(**settings: Any) -> Any:
    return make_model(PersonalRewardModel, backbone=make_backbone("bert"), **settings)


@pytest.mark.parametrize(
    ("max_prompt_tokens", "start"),
    [
        (50, "[CLS] write about the [SEP] "),
        (5, "[CLS] write about the [SEP] "),
        (4, "[CLS] about the [SEP] "),
        (2, "[CLS] "),
        (0, "[CLS] "),  # no prompt at all
    ],
)
def test_text_for_a_bidirectional_encoder(
    word_tokenizer: Any, max_prompt_tokens: int, start: str
) -> None:
    data = make_data(word_tokenizer, causal=False, max_prompt_tokens=max_prompt_tokens)
    batch = data.datasets["train"].batch([0, 4])
    assert batch.input_ids.shape[0] == 4 and len(batch) == 2
    written = [
        word_tokenizer.decode(ids[segment >= 0])
        for ids, segment in zip(batch.input_ids, batch.segment, strict=True)
    ]
    assert written[0] == start + "write [SEP]"
    assert written[2] == start + "and calm . [SEP]"


@torch.no_grad()
def test_reward_of_a_bidirectional_encoder_is_that_of_one_sequence(word_tokenizer: Any) -> None:
    data = make_data(word_tokenizer, causal=False)
    model = bert_reward_model(aggregator="film_last", personal=False, pooling="mean").eval()
    found = margins(model, data, "train")["user"]
    for place, pair in enumerate(data.datasets["train"].pairs):
        rewards = []
        for response in (pair.chosen, pair.rejected):
            hidden = model.backbone.model(tensor([[*pair.prompt, *response]])).last_hidden_state[0]
            rewards.append(model.head.weight @ hidden[len(pair.prompt) :].mean(0))
        torch.testing.assert_close(found[place], (rewards[0] - rewards[1])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("aggregator", ["soft_prompt", "film_last"])
def test_a_bidirectional_reward_model_learns(word_tokenizer: Any, aggregator: str) -> None:
    data = make_data(word_tokenizer, causal=False)
    optim = Optim(lr=1e-2, user_lr=1e-2, head_lr=1e-2, warmup_steps=0)
    model = bert_reward_model(aggregator=aggregator, optim=optim)
    trainer = Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )

    def loss() -> float:
        with torch.no_grad():
            every = [model.eval().loss(batch)[0] for batch in data.evaluation_loader("train")]
        return float(torch.cat(every).mean())

    before = loss()
    trainer.fit(model.train(), datamodule=data)
    assert loss() < 0.5 * before
    assert trainer.callback_metrics["val/nll"].isfinite()


@torch.no_grad()
def test_hidden_states_of_a_bidirectional_encoder_beforehand(word_tokenizer: Any) -> None:
    data = make_data(word_tokenizer, causal=False)
    model = bert_reward_model(aggregator="film_last").eval()
    online = margins(model, data, "train")["user"]
    data.precompute_hidden(model.pooled_trunk)
    torch.testing.assert_close(margins(model, data, "train")["user"], online, atol=1e-5, rtol=0)


def test_texts_by_hand(tokenizer: Any) -> None:
    dataset = make_data(tokenizer).datasets["val"]
    dataset.pairs = [
        TokenPair((1,), (2,), (3,)),
        TokenPair((1,), (3,), (4,)),
        TokenPair((9,), (2,), (3,)),
    ]
    texts, places = distinct_texts(dataset.pairs)
    assert texts == [((1,), (2,)), ((1,), (3,)), ((1,), (4,)), ((9,), (2,)), ((9,), (3,))]
    assert places.tolist() == [[0, 1], [1, 2], [3, 4]]


def test_texts_of_one_prompt_share_a_row_by_hand() -> None:
    texts = [((1,), (2,)), ((9,), (2,)), ((1,), (3,)), ((1,), (4,)), ((9,), (5,))]
    pairs, places = texts_as_pairs(texts, share_prompts=True)
    assert pairs == [
        TokenPair((1,), (2,), (3,)),
        TokenPair((9,), (2,), (5,)),
        TokenPair((1,), (4,), ()),
    ]
    assert places.tolist() == [[0, 2], [1, 4], [3, 5]]
    pairs, places = texts_as_pairs(texts[:2], share_prompts=False)
    assert pairs == [TokenPair((1,), (2,), ()), TokenPair((9,), (2,), ())]
    assert places.tolist() == [[0, 2], [1, 2]]


LONG_VAL = [
    *(one for one in RECORDS if one["split"] != "val"),
    *(long_record(i, "ann", "val") for i in range(2)),
]
BAD = [
    (
        lambda tokenizer: make_data(tokenizer, batch_size=0),
        "data.batch_size=0 is not allowed: expected a whole number from 1. Set data.batch_size=32.",
    ),
    (
        lambda tokenizer: make_data(tokenizer, eval_batch_size=0),
        "data.eval_batch_size=0 is not allowed: expected a whole number from 1. "
        "Set data.eval_batch_size=32.",
    ),
    (
        lambda tokenizer: make_data(tokenizer, batch_tokens=0),
        "data.batch_tokens=0 is not allowed: expected a whole number from 1. "
        "Set data.batch_tokens=4096.",
    ),
    (
        lambda tokenizer: make_data(tokenizer, max_tokens=0),
        "data.max_tokens=0 is not allowed: expected a whole number from 1. Set data.max_tokens=1024.",
    ),
    (
        lambda tokenizer: make_data(tokenizer, max_tokens=3),
        "data.max_tokens=3 is not allowed: expected room for some of the 17 train rows, and none "
        "fits. Raise data.max_tokens.",
    ),
    (
        lambda tokenizer: make_data(tokenizer, max_tokens=90, records=LONG_VAL),
        "data.max_tokens=90 is not allowed: expected room for some of the 2 val rows, and none "
        "fits. Raise data.max_tokens.",
    ),
    (
        lambda tokenizer: make_data(tokenizer).tokenize(
            tokenizer, layout="packed", max_positions=1023
        ),
        "data.max_tokens=1024 is not allowed: expected at most the backbone's 1023 positions. "
        "Set data.max_tokens=1023.",
    ),
    (
        lambda _: all_as_test(Rows.from_rows([parse_row(RECORDS[0], "f:1")]), ["ann"]),
        "test rows=0 is not allowed: expected 1 or more. "
        "Give rows without split, or with split=test.",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_settings(tokenizer: Any, build: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(tokenizer)
    assert str(caught.value) == message


def test_a_lookup_of_the_data_module_fits_its_users(tokenizer: Any) -> None:
    data = make_data(tokenizer)
    encoder = LookupEncoder(
        n_users=data.n_users, user_dim=2, vocabulary=torch.zeros(3, 2), init="normal"
    )
    unseen = data.datasets["test"].batch([0]).users
    assert encoder(unseen).equal(encoder.generic(1))
