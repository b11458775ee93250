"""Rows as batches: numbering, features, counts, which rows and users are left out."""

from __future__ import annotations

import pickle
from collections import Counter
from math import isnan
from typing import Any

import pytest
import torch
from pair_data import FEATURES, RECORDS, WORDS, ListSource, make_data, record, served

from plrhf.core.row_packing import NO_USER
from plrhf.data.module import PreferenceData
from plrhf.data.parsing import parse_row
from plrhf.data.rows import Rows
from plrhf.data.splits import all_as_test
from plrhf.encoders import LookupEncoder


def test_users_are_numbered_from_1_and_others_are_generic(tokenizer: Any) -> None:
    data = make_data(tokenizer)
    assert data.splits.users == ("ann", "bob", "cat") and data.n_users == 3
    assert data.datasets["train"].user_id[:4].tolist() == [3, 1, 2, 3]
    assert data.datasets["test"].user_id[:4].tolist() == [0, 2, 1, 0]  # zoe was never seen
    assert data.unseen_users() == {"zoe"}


def test_features_are_in_units_of_the_train_users(tokenizer: Any) -> None:
    data = make_data(tokenizer)
    # Ages 20 and 40: mean 30, deviation 10. Code 0 is north; west is unknown.
    assert data.datasets["train"].features[:2].tolist() == [[-1.0, 0.0], [1.0, 0.0]]
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
        "truncated": {
            **{"prompt truncated": 1, "response truncated": 0, "response too long": 1},
            **{"earlier turns left out": 0, "turn computed apart": 0},
        },
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
        lambda tokenizer: make_data(tokenizer).fit_to_model(max_positions=1023, user_slots=NO_USER),
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
