"""Rankings become pairs that stay together: in a split, in a batch, on a process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pair_data import WORDS, make_data, served

from plrhf.core.errors import BadValue
from plrhf.data.dataset import RankShard
from plrhf.data.groups import Groups
from plrhf.data.reading import read_rows
from plrhf.data.sources.jsonl import JsonlSource

RECORD = {"prompt": "Hi?", "user": 7}
GOOD = [
    {**RECORD, "ranking": ["a", "b", "c"]},
    {**RECORD, "responses": ["x", "y"], "ranks": [2, 1.0], "pair_id": "mine"},
]


def read(path: Path, records: list[Any]) -> Any:
    path.write_text("\n".join(map(json.dumps, records)))
    source = JsonlSource(path=str(path))
    return (*read_rows(source.records()), source.form)


def test_a_ranking_becomes_its_pairs(tmp_path: Path) -> None:
    rows, report, form = read(tmp_path / "r.jsonl", GOOD)
    assert form == "rankings" and report.refused == {}
    assert [(row.chosen, row.rejected) for row in rows] == [
        *(("a", "b"), ("a", "c"), ("b", "c")),
        ("y", "x"),
    ]
    assert {row.user_id for row in rows} == {"7"}
    assert rows[0].group_id == rows[2].group_id != rows[3].group_id == "mine"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"ranking": ["a", "b", "a "]},
            "ranking=['a', 'b', 'a '] is not allowed: expected each resp",
        ),
        ({"ranking": ["a"]}, "ranking='1 responses' is not allowed: expected 2 to 16 responses"),
        ({"ranking": ["a", " "]}, "ranking=['a', ' '] is not allowed: expected a list of texts"),
        ({"ranking": "a > b"}, "ranking='a > b' is not allowed: expected a list of texts"),
        (
            {"responses": ["a", "b"], "ranks": [1, 1]},
            "ranks=[1, 1] is not allowed: expected a diff",
        ),
        ({"responses": ["a", "b"], "ranks": [float("nan"), 2]}, "ranks=[nan, 2] is not allowed"),
        ({"responses": ["a", "b"], "ranks": [1]}, "ranks=[1] is not allowed: expected a rank for"),
        (
            {"responses": ["a", "b"], "ranks": ["1", 2]},
            "ranks=['1', 2] is not allowed: expected num",
        ),
    ],
)
def test_bad_rankings_are_refused_as_a_whole(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    rows, report, _ = read(tmp_path / "r.jsonl", [GOOD[0], {**RECORD, **fields}])
    assert len(rows) == 3
    assert report.refused == {"ranking with repeats or too few responses": 1}
    (said,) = report.examples.values()
    assert said.startswith(f"{tmp_path}/r.jsonl:2: {message}") and "\n" not in said


RANKED = [
    {
        "prompt": f"{WORDS[n % 7]} {WORDS[n % 5]}",
        "ranking": [" ".join(WORDS[at : at + 1 + (n + at) % 4]) for at in range(2 + n % 3)],
        "user": "ann" if n % 2 == 0 else "bob",
        "split": ("train", "train", "val", "test")[n % 4],
    }
    for n in range(40)
]


@pytest.fixture(scope="module")
def data(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("rankings") / "r.jsonl"
    path.write_text("\n".join(map(json.dumps, RANKED)))
    found = make_data(
        tokenizer,
        records=[one for _, one in JsonlSource(path=str(path)).records()],
        batch_size=6,
        eval_batch_size=5,
    )
    assert len(found.datasets["train"]) > 20
    return found


def groups_in(data: Any, split: str, batches: list[list[int]]) -> list[set[int]]:
    """The groups of each batch, which are in no other and complete."""
    number = data.datasets[split].groups.number
    sizes = np.bincount(number)
    found = [set(number[one].tolist()) for one in batches]
    for batch, groups in zip(batches, found, strict=True):
        assert len(batch) == sum(sizes[group] for group in groups)
    assert sorted(place for one in batches for place in one) == list(range(len(number)))
    return found


def test_batches_have_whole_rankings(data: Any) -> None:
    batches = served(data.train_dataloader())
    groups_in(data, "train", batches)
    assert np.mean([len(one) for one in batches]) == pytest.approx(6, abs=1.5)
    groups_in(data, "val", served(data.evaluation_loader("val")))
    (epoch,) = (data._train_sampler().epoch(1),)
    assert len(epoch) == len(batches) and epoch[0].tolist() != batches[0]


def test_choices_are_numbered_within_a_batch(data: Any) -> None:
    train = data.datasets["train"]
    for batch in data.train_dataloader():
        choice = batch.feedback.choice
        rows = [train.rows[place] for place in batch.row.tolist()]
        assert int(choice.max()) < len(rows)
        for one, first in zip(rows, choice.tolist(), strict=True):
            for other, second in zip(rows, choice.tolist(), strict=True):
                same = (one.group_id, one.chosen) == (other.group_id, other.chosen)
                assert (first == second) == same
        assert batch.packing.until is not None  # a user acts behind the trunk: prefixes are shared


def test_processes_get_whole_rankings(data: Any) -> None:
    train = data.datasets["train"]
    indices = served(data.train_dataloader())[0]
    shards = [train.shard(indices, RankShard(rank=rank, world_size=2)) for rank in range(2)]
    rows = [one.row.tolist() for one in shards]
    assert sorted(rows[0] + rows[1]) == sorted(indices)
    numbers = [set(train.groups.number[one].tolist()) for one in rows]
    assert numbers[0].isdisjoint(numbers[1])
    total = sum(float(one.mean(torch.ones(len(one)))) for one in shards)
    assert total == pytest.approx(2.0)


def test_a_pair_of_no_group_is_one_of_its_own() -> None:
    groups = Groups([None, "a", None, "a", "b"])
    assert groups.number.tolist() == [0, 1, 2, 1, 3]
    assert groups.pairs(np.array([1, 0])).tolist() == [1, 3, 0]
    assert groups.cut(np.array([4, 3, 2, 1, 0]), 3) == [[4, 1, 3], [2, 0]]


@pytest.mark.parametrize("split_by", ["pair", "response", "user"])
def test_rankings_are_divided_by_prompt_alone(split_by: str, tokenizer: Any) -> None:
    records = [{**one, "group_id": "g"} for one in PLAIN]
    with pytest.raises(BadValue, match=f"data.split_by='{split_by}' is not allowed: expected prom"):
        make_data(tokenizer, records=records, split_by=split_by)


PLAIN = [
    {"prompt": f"write {n}", "chosen": "the sea", "rejected": "home", "user_id": "ann"}
    for n in range(12)
]


@pytest.mark.parametrize("setting", ["batch_tokens", "users_per_batch"])
def test_settings_that_would_part_a_ranking(setting: str, tokenizer: Any) -> None:
    records = [{**one, "group_id": "g"} for one in PLAIN]
    data = make_data(tokenizer, records=records, **{setting: 2})
    with pytest.raises(
        BadValue, match=f"data.{setting}=2 is not allowed: expected null where rows"
    ):
        data.train_dataloader()
