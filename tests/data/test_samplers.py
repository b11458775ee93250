"""The order of batches: its resumption, buckets, padding, and shares of several processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pair_data import make_data, served
from tiny import assert_same, gradients, make_backbone, make_model

from plrhf.data.dataset import RankShard
from plrhf.data.samplers import PairSampler, UserSampler, length_buckets
from plrhf.models.reward import PersonalRewardModel


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


def test_batches_of_users() -> None:
    """Every pair once an epoch; a batch has at most two users, and three pairs of each."""
    users = np.array([4, 1, 4, 4, 2, 2, 4, 4, 1, 4, 4, 3])  # 7 pairs of 4, 2 of 1 and 2, 1 of 3
    lengths = np.ones((12, 1), dtype=np.int64)
    sampler = UserSampler(
        lengths, users, users_per_batch=2, pairs_per_user=3, seed=0, accumulated_batches=2
    )
    epochs = [list(sampler) for _ in range(2)]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert len(epoch) == len(sampler) == 4  # four users, then 4 alone in two rounds
        assert sorted(place for places, *_ in epoch for place in places) == list(range(12))
        for places, *_ in epoch:
            _, counts = np.unique(users[places], return_counts=True)
            assert len(counts) <= 2 and counts.max() <= 3
        sizes = [len(places) for places, *_ in epoch]
        for step in (slice(0, 2), slice(2, 4)):
            expected = [2 * size / sum(sizes[step]) for size in sizes[step]]
            assert [weight for _, weight, _ in epoch[step]] == pytest.approx(expected)


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
