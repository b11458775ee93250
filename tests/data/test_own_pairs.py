"""Other pairs of the user beside each pair: whose they are, when they change, what never stands there."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from test_data_module import make_data, record

from plrhf.core.types import PreferenceBatch
from plrhf.data.dataset import PairDataset, RankShard, TextValues
from plrhf.data.module import PreferenceData
from plrhf.data.own_pairs import TrainPairs, draw_context, text_keys
from plrhf.data.rows import Row
from plrhf.data.text_values import distinct_texts

LEAST, MOST = 2, 5


def row(number: int, *, prompt: str = "", chosen: str = "", prompt_id: str = "") -> Row:
    texts = (prompt or f"p{number}", chosen or f"c{number}", f"r{number}")
    return Row(*texts, "ann", prompt_id or f"id{number}", f"pair{number}")


def records() -> list[dict[str, Any]]:
    """Ann has 23 train pairs, bob 5, cat 1; some pairs of ann have a text in common."""
    users = ["ann"] * 23 + ["bob"] * 5 + ["cat"]
    rows = [record(at, user, "train") for at, user in enumerate(users)]
    for at, one in enumerate(rows):
        one["chosen"] = f"boats sail {' '.join(['far'] * (at % 9))} home {'.' * (1 + at // 9)}"
        one["prompt_id"] = one["prompt"]
    rows += [dict(rows[25], split="val", pair_id="again"), record(4, "bob", "val")]
    rows += [record(at, ("ann", "zoe")[at % 2], "test") for at in range(5)]
    return [{**one, "user_features": {}} for one in rows]


def data_with_context(tokenizer: Any, **more: Any) -> PreferenceData:
    """Data whose contexts say by their values which train texts they hold."""
    data: PreferenceData = make_data(tokenizer, records=records(), batch_size=7, **more)
    train = data.datasets["train"]
    _, of_pair = distinct_texts(train.pairs)
    numbers = torch.arange(float(of_pair.max()) + 1)[:, None]
    train.context_hidden = TextValues(numbers, of_pair)
    draw_context(data.datasets, least=LEAST, most=MOST, seed=data.seed)
    return data


def texts_of(batch: PreferenceBatch, place: int) -> set[tuple[int, int]]:
    """Texts of the pairs beside a pair of a batch, by their numbers."""
    assert batch.context is not None
    pairs = batch.context.texts[place][batch.context.present[place]]
    found = batch.context.hidden[pairs].squeeze(-1).long()  # [k, 2]
    return {(int(one), int(other)) for one, other in found}


def leaks(data: PreferenceData) -> set[str]:
    """What stands beside pairs and must not, over all splits and two epochs."""
    train = data.datasets["train"]
    assert train.context_hidden is not None
    of_pair = train.context_hidden.of_pair.tolist()
    own: dict[str, set[tuple[int, int]]] = {}
    for (chosen, rejected), one in zip(of_pair, train.rows, strict=True):
        own.setdefault(one.user_id, set()).add((chosen, rejected))
    number = {
        (train.rows[at].prompt, text): of_pair[at][side]
        for at in range(len(train))
        for side, text in enumerate((train.rows[at].chosen, train.rows[at].rejected))
    }
    found = set()
    for split, dataset in data.datasets.items():
        for epoch in range(2):
            batch = dataset.batch(range(len(dataset)), epoch=epoch)
            for place, one in enumerate(dataset.rows):
                beside = texts_of(batch, place)
                if not beside <= own.get(one.user_id, set()):
                    found.add(f"{split}: no train pair of the user")
                asked = {number.get((one.prompt, text)) for text in (one.chosen, one.rejected)}
                if any(asked & {*pair} for pair in beside):
                    found.add(f"{split}: a text of the pair asked")
    return found


def test_contexts_hold_train_pairs_of_the_user_and_never_what_is_asked(tokenizer: Any) -> None:
    data = data_with_context(tokenizer)
    assert leaks(data) == set()
    batch = data.datasets["train"].batch(range(29))
    assert batch.context is not None
    counts = batch.context.present.sum(dim=1).tolist()
    assert set(counts[:23]) == {2, 3, 4, 5} and counts[28] == 0  # cat has no other pair
    assert batch.users.context is batch.context
    of_nobody = data.datasets["test"].batch([1]).context  # zoe was never seen
    assert of_nobody is not None and not of_nobody.present.any()


def test_the_pair_asked_in_its_own_context_is_caught(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = lambda self, places, texts: np.zeros(places.shape, np.bool_)  # noqa: E731
    monkeypatch.setattr(TrainPairs, "_shares_text", none)
    found = leaks(data_with_context(tokenizer))
    assert found >= {"train: a text of the pair asked", "val: a text of the pair asked"}


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_context_from_val_or_test_is_caught(tokenizer: Any, split: str) -> None:
    data = data_with_context(tokenizer)
    other = data.datasets[split]
    _, of_pair = distinct_texts(other.pairs)
    other.context_hidden = TextValues(torch.arange(900.0, 999.0)[:, None], of_pair)
    asked = {"train": other, "asked": data.datasets["train"]}
    draw_context(asked, least=LEAST, most=MOST, seed=data.seed)
    assert "train: no train pair of the user" in leaks(data)


def test_a_draw_depends_on_seed_epoch_and_pair_alone(tokenizer: Any) -> None:
    data = data_with_context(tokenizer)
    train = data.datasets["train"]

    def drawn(places: list[int], epoch: int, dataset: PairDataset = train) -> list[Any]:
        batch = dataset.batch(places, epoch=epoch)
        return [sorted(texts_of(batch, at)) for at in range(len(places))]

    whole = drawn(list(range(29)), 5)
    assert drawn([28, 3, 11], 5) == [whole[28], whole[3], whole[11]]
    assert drawn(list(range(29)), 6) != whole
    assert drawn(list(range(29)), 5, data_with_context(tokenizer).datasets["train"]) == whole
    assert (
        drawn(list(range(29)), 5, data_with_context(tokenizer, seed=4).datasets["train"]) != whole
    )
    test = data.datasets["test"]
    assert drawn([0, 2, 4], 0, test) == drawn([0, 2, 4], 9, test)


def test_loaders_of_several_processes_that_go_on_draw_what_one_draws(tokenizer: Any) -> None:
    data = data_with_context(tokenizer)

    def served(loader: Any, skip: int = 0) -> dict[tuple[int, int], Any]:
        found, turn = {}, skip
        for _ in range(2):
            for batch in loader:
                for at, place in enumerate(batch.row.tolist()):
                    found[turn, place] = sorted(texts_of(batch, at))
                turn += 1
        return found

    whole = served(data.train_dataloader())
    later = data.train_dataloader()
    later.load_state_dict({"served": 3})  # type: ignore[attr-defined]
    parts: dict[Any, Any] = served(later, 3)
    assert parts.keys() >= {key for key in whole if key[0] >= 3}
    assert all(parts[key] == whole[key] for key in whole if key[0] >= 3)
    of_ranks: dict[Any, Any] = {}
    for rank in range(2):
        data.set_shard(RankShard(rank=rank, world_size=2))
        of_ranks |= served(data.train_dataloader())
    assert of_ranks == whole


def test_all_numbers_of_pairs_and_all_pairs_are_as_likely() -> None:
    rows = [row(number) for number in range(9)]
    pairs = TrainPairs(rows, np.ones(9, np.int64), least=1, most=3, seed=2)
    sizes, taken = Counter[int](), Counter[int]()
    for epoch in range(400):
        places, present = pairs.draw(np.ones(9, np.int64), np.arange(9), pairs.texts, epoch=epoch)
        sizes.update(present.sum(axis=1).tolist())
        taken.update(places[0][present[0]].tolist())
        assert all(
            len({*one[there]}) == there.sum() for one, there in zip(places, present, strict=True)
        )
    # 3,600 draws, a third each; 400 draws of 2 on average from 8 other pairs: 100 each.
    assert all(abs(sizes[size] - 1200) < 120 for size in (1, 2, 3))
    assert sorted(taken) == list(range(1, 9)) and all(abs(n - 100) < 40 for n in taken.values())


def test_texts_are_shared_by_prompt_text_or_prompt_id() -> None:
    rows = [
        row(0, prompt="sea", chosen="blue"),
        row(1, prompt="sea", chosen="blue"),  # another id
        row(2, chosen="blue", prompt_id="id0"),  # another text
        row(3, chosen="blue"),  # another prompt
        row(4, prompt="sea"),  # another response
    ]
    keys = text_keys(rows)
    shares = [bool(np.isin(one, keys[0]).any()) for one in keys]
    assert shares == [True, True, True, False, False]
    pairs = TrainPairs(rows, np.array([1, 1, 1, 1, 1]), least=4, most=4, seed=0)
    places, present = pairs.draw(np.array([1]), np.array([0]), keys[:1], epoch=0)
    assert sorted(places[present].tolist()) == [3, 4]


def test_fewer_at_least_than_at_most() -> None:
    with pytest.raises(ValueError, match=r"^encoder\.min_pairs=5 is not allowed: expected at most"):
        TrainPairs([row(0)], np.array([1]), least=5, most=4, seed=0)


def test_a_heavy_users_window_holds_pairs_from_everywhere() -> None:
    rows = [row(number) for number in range(500)]
    pairs = TrainPairs(rows, np.ones(500, np.int64), least=4, most=4, seed=0)
    asked = np.arange(500)
    places, present = pairs.draw(np.ones(500, np.int64), asked, pairs.texts, epoch=0)
    assert present.all() and len({*places.ravel().tolist()}) > 450
    assert not (places == asked[:, None]).any()
