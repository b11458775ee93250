"""Values of texts on disk: found again, added to, never trusted where they are not whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from lightning import Trainer
from tiny import make_backbone, make_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from plrhf.backbone.model import Backbone
from plrhf.core.types import CHOSEN, PROMPT, REJECTED, PreferenceBatch
from plrhf.data import text_value_cache
from plrhf.data.dataset import SINGLE_PROCESS, PairDataset, RankShard
from plrhf.data.module import PreferenceData
from plrhf.data.packing import TokenPair
from plrhf.data.text_value_cache import TextValueCache, text_values_key
from plrhf.data.text_values import compute_text_values
from plrhf.evaluation.predictions import prepare
from plrhf.models.policy import PersonalDPOPolicy
from plrhf.models.reward import PersonalRewardModel

TEXTS = [((1, 2), (3,)), ((1,), (2, 3)), ((), (1, 2, 3)), ((1, 2, 3), ()), ((7,), (8,))]


def test_what_was_added_is_found(tmp_path: Path) -> None:
    assert TextValueCache(tmp_path / "none").find(TEXTS) == (None, [0, 1, 2, 3, 4])
    values = torch.randn(5, 3)
    TextValueCache(tmp_path).add([TEXTS[3], TEXTS[0]], values[[3, 0]])
    found, missing = TextValueCache(tmp_path).find(TEXTS)
    assert missing == [1, 2, 4]
    assert found is not None and found[[0, 3]].equal(values[[0, 3]]) and found[1].eq(0).all()
    TextValueCache(tmp_path).add([TEXTS[2], TEXTS[4], TEXTS[1]], values[[2, 4, 1]])
    found, missing = TextValueCache(tmp_path).find(TEXTS)
    assert missing == [] and found is not None and found.equal(values)


def test_half_written_and_damaged_files_are_passed_over(tmp_path: Path) -> None:
    TextValueCache(tmp_path).add(TEXTS[:2], torch.ones(2, 1))
    (whole,) = tmp_path.iterdir()
    bits = whole.read_bytes()
    (tmp_path / "killed.part").write_bytes(bits[: len(bits) // 2])
    (tmp_path / "values-cut.arrays").write_bytes(bits[:-3])
    (tmp_path / "values-empty.arrays").write_bytes(b"")
    found, missing = TextValueCache(tmp_path).find(TEXTS)
    assert missing == [2, 3, 4] and found is not None and found[:2].eq(1).all()
    whole.write_bytes(bits[:-1] + bytes([bits[-1] ^ 4]))
    assert TextValueCache(tmp_path).find(TEXTS) == (None, [0, 1, 2, 3, 4])


def test_values_that_are_damaged_later_are_computed_anew(tmp_path: Path, capsys: Any) -> None:
    TextValueCache(tmp_path).add(TEXTS[1:3], torch.ones(2, 9_000))
    (path,) = tmp_path.iterdir()
    cache = TextValueCache(tmp_path)
    with path.open("r+b") as file:  # the last value, far from the keys
        file.seek(2 * 8 + 2 * 9_000 * 4 - 1)
        file.write(b"x")
    found, missing = cache.find([TEXTS[1], TEXTS[3]])
    assert found is not None and found[0].eq(1).all() and missing == [1]
    assert cache.find(TEXTS[1:3]) == (None, [0, 1]) and not path.exists()
    assert capsys.readouterr().out == f"damaged and removed, to be made anew: {path}\n"


def prepared(model: Any, cache_dir: Path, pairs: list[TokenPair]) -> tuple[Any, list[int]]:
    """A dataset of these pairs prepared for the model, and how many rows each batch had."""
    data = object.__new__(PreferenceData)
    data.shard = SINGLE_PROCESS
    data.eval_batch_size = 2
    data.datasets = {"train": PairDataset.from_tokens(pairs)}
    rows: list[int] = []
    counted = type(model.backbone).forward

    def forward(self: Any, inputs: Tensor, *others: Any, **named: Any) -> Tensor:
        rows.append(len(inputs))
        return counted(self, inputs, *others, **named)

    model.backbone.forward = forward.__get__(model.backbone)
    prepare(model, data, Trainer(accelerator="cpu", logger=False), cache_dir=cache_dir)
    return data.datasets["train"], rows


PAIRS = [
    TokenPair((5, 6), (1, 2), (3,)),
    TokenPair((5, 6), (3,), (4, 4)),
    TokenPair((7,), (1,), (2,)),
]
MORE = [*PAIRS, TokenPair((8, 8), (1,), (2, 2)), TokenPair((7,), (9,), (1,))]


@pytest.mark.parametrize("kind", [PersonalDPOPolicy, PersonalRewardModel])
def test_a_second_run_computes_nothing_and_has_the_same(kind: Any, tmp_path: Path) -> None:
    def model(seed: int) -> Any:
        trainable = "lora" if kind is PersonalDPOPolicy else "frozen"
        made = make_model(kind, backbone=make_backbone(trainable=trainable), aggregator="film_last")
        torch.manual_seed(seed)
        for parameter in made.encoder.parameters():  # another user model on the same backbone
            parameter.data.normal_()
        return made

    first, rows = prepared(model(1), tmp_path, PAIRS)
    assert (
        sum(rows) == 3
    )  # five texts of two prompts: three share a prompt, one of them stays alone
    again, none = prepared(model(2), tmp_path, PAIRS)
    assert none == []
    at = torch.arange(3)
    name = "ref_logps" if kind is PersonalDPOPolicy else "hidden"
    assert getattr(first, name)[at].equal(getattr(again, name)[at])
    more, rows = prepared(model(3), tmp_path, [*PAIRS, TokenPair((7,), (9,), (1,))])
    assert rows == [1]  # the one text that is new
    assert getattr(more, name)[at].equal(getattr(first, name)[at])


def test_another_backbone_has_its_own(tmp_path: Path) -> None:
    for change in (0.0, 1e-6):  # less than the export's fingerprint sees
        model = make_model(PersonalDPOPolicy)
        model.backbone.model.get_output_embeddings().weight.data[0, 0] += change
        assert prepared(model, tmp_path, PAIRS)[1] != []
    assert len(list(tmp_path.iterdir())) == 2


CONFIG: dict[str, Any] = {
    "rope_parameters": {"rope_theta": 1e4},
    "_name_or_path": "here",
    "text_config": {"window": 7, "transformers_version": "1"},
}


def key(**changes: Any) -> str:
    given = {
        "weights": "w",
        "config": CONFIG,
        "attention": "sdpa",
        "layout": "packed",
        "precision": "32-true",
        "computed": ("pooled", "mean"),
    }
    return text_values_key(**{**given, **changes})


def test_the_key_tells_apart_all_that_decides_values(monkeypatch: Any) -> None:
    keys = [
        key(),
        key(weights="v"),
        key(config={**CONFIG, "rope_parameters": {"rope_theta": 1e6}}),
        key(config={**CONFIG, "text_config": {"window": 8}}),
        key(attention="eager"),
        key(layout="two_rows"),
        key(precision="bf16-true"),
        key(computed=("pooled", "last")),
        key(computed=("pooled mean",)),
    ]
    monkeypatch.setattr(text_value_cache, "COMPUTATION", text_value_cache.COMPUTATION + 1)
    keys.append(key())
    monkeypatch.undo()
    for library in ("torch", "transformers", "peft"):
        monkeypatch.setattr(
            text_value_cache,
            "version",
            lambda name, other=library: "0.0" if name == other else version(name),
        )
        keys.append(key())
        monkeypatch.undo()
    assert len(set(keys)) == len(keys) == 13


def test_the_key_is_that_of_the_same_model_elsewhere() -> None:
    elsewhere = {"_name_or_path": "there", "text_config": {"window": 7}}
    assert (
        key(config={**CONFIG, **elsewhere}) == key(config=dict(reversed(CONFIG.items()))) == key()
    )


def test_values_of_the_same_weights_in_another_model_are_not_taken(tmp_path: Path) -> None:
    for number, changes in enumerate(
        [{}, {"rope_theta": 50.0}, {"attn_implementation": "eager"}, {}], 1
    ):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=11,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            attn_implementation=changes.get("attn_implementation", "sdpa"),
            rope_theta=changes.get("rope_theta", 1e4),
        )
        backbone = Backbone(model=LlamaForCausalLM(config), trainable="frozen")
        found, rows = prepared(make_model(PersonalDPOPolicy, backbone=backbone), tmp_path, PAIRS)
        assert (rows == []) == (number == 4)  # the first model again
        assert len(list(tmp_path.iterdir())) == min(number, 3)


class Together:
    """Processes as threads, each with its shard, that wait for one another where processes do."""

    def __init__(self, n: int) -> None:
        self.said: list[Any] = [None] * n
        self.barrier = Barrier(n, timeout=120)

    def shard(self, rank: int) -> RankShard:
        def all_say(value: Any) -> list[Any]:
            self.said[rank] = value
            self.barrier.wait()
            said = list(self.said)
            self.barrier.wait()
            return said

        def total(values: Tensor) -> Tensor:
            said = all_say(values)
            assert all(one.shape == values.shape for one in said)
            return torch.stack(said).sum(dim=0)

        return RankShard(rank, len(self.said), total, lambda value: all_say(value)[0])

    def values(self, pairs: list[TokenPair], folder: Path) -> tuple[list[Tensor], list[int]]:
        """Values [N, 2, 3] of the pairs as each process has them, and pairs computed by each."""
        n_computed = [0] * len(self.said)

        def of_rank(rank: int) -> Tensor:
            def compute(batch: PreferenceBatch) -> Tensor:
                n_computed[rank] += int(batch.counted().sum())
                return meaning(batch)

            cache = TextValueCache(folder) if rank == 0 else None
            dataset = PairDataset.from_tokens(pairs)
            found = compute_text_values(dataset, compute, 2, cache, shard=self.shard(rank))
            assert found is not None
            return found[torch.arange(len(pairs))]

        with ThreadPoolExecutor(len(self.said)) as threads:
            return list(threads.map(of_rank, range(len(self.said)))), n_computed


def meaning(batch: PreferenceBatch) -> Tensor:
    """Three numbers of each text, [B, 2, 3], which no two of these tests share."""
    prompt = (batch.input_ids * (batch.segment == PROMPT)).sum(dim=1)
    responses = [(batch.input_ids * (batch.segment == mark)) for mark in (CHOSEN, REJECTED)]
    of_text = torch.stack([one.sum(dim=1) for one in responses], dim=1)  # [B, 2]
    return torch.stack([of_text, 100.0 * of_text + prompt[:, None], of_text**2], dim=2).float()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_processes_agree_on_what_is_known(n: int, tmp_path: Path) -> None:
    expected = meaning(PairDataset.from_tokens(MORE).batch(range(len(MORE))))
    found, n_computed = Together(n).values(MORE[:3], tmp_path)
    assert all(one.equal(expected[:3]) for one in found)
    assert sum(n_computed) == 3  # five texts of two prompts, two to a row
    (first,) = tmp_path.iterdir()
    found, n_computed = Together(n).values(MORE, tmp_path)
    assert all(one.equal(expected) for one in found)
    assert sum(n_computed) == 2  # two of another prompt, and one new response
    assert len(list(tmp_path.iterdir())) == 2 and first.is_file()
    for again in (1, 2):
        found, n_computed = Together(again).values(MORE, tmp_path)
        assert all(one.equal(expected) for one in found) and sum(n_computed) == 0
    assert len(list(tmp_path.iterdir())) == 2
