"""The embedded world must be what it claims to be; shown without any neural network."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from plrhf.data.parsing import parse_row
from plrhf.data.sources.persona_texts import DRAWS, LONG, TOPICS, write
from plrhf.data.sources.personas import ATTRIBUTES, PersonasSource, measure

KINDS = ("individual", "clusters", "features")

SMALL: dict[str, Any] = {"n_users": 7, "n_unseen_users": 3, "pairs_per_user": 11, "n_prompts": 23}


class Table:
    """A world's rows as arrays: difference of measured styles, true margin, user, split."""

    def __init__(self, source: PersonasSource) -> None:
        self.rows = [row for _, row in source.records()]
        oracle = source.oracle_margins()
        styles = {
            side: [measure(row[side]) for row in self.rows] for side in ("chosen", "rejected")
        }
        self.difference = np.array(styles["chosen"]) - np.array(styles["rejected"])  # [N, A]
        self.margin = np.array([oracle[row["pair_id"]] for row in self.rows])
        self.user = np.array([row["user_id"] for row in self.rows])
        self.split = np.array([row["split"] for row in self.rows])


def accuracy(margins: np.ndarray) -> float:
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def bradley_terry_fit(difference: np.ndarray, strength: float) -> np.ndarray:
    """Weights [A] of a ridge logistic regression that always sees the chosen side win."""
    mirrored = np.concatenate([difference, -difference])
    labels = np.repeat([1, 0], len(difference))
    model = LogisticRegression(fit_intercept=False, C=strength).fit(mirrored, labels)
    return model.coef_[0]


@pytest.fixture(scope="module")
def tables() -> dict[tuple[str, int], tuple[PersonasSource, Table]]:
    worlds = {}
    for kind, seed in itertools.product(KINDS, (0, 1, 2)):
        pairs = 100 if (kind, seed) == ("individual", 0) else 25
        source = PersonasSource(kind=kind, pairs_per_user=pairs, val_pairs_per_user=0, seed=seed)
        worlds[kind, seed] = (source, Table(source))
    return worlds


def test_measure_recovers_every_style_exactly() -> None:
    rng = np.random.default_rng(3)
    for style in itertools.product((-1, 1), repeat=len(ATTRIBUTES)):
        for _ in range(60):
            topic = TOPICS[rng.integers(len(TOPICS))]
            draws = rng.random((LONG, DRAWS)).tolist()
            assert measure(write(topic=topic, style=style, draws=draws)) == style


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("", (-1, 0, 0, 0)),
        ("?! ...", (-1, 0, 0, 0)),
        ("the mill at Marlow", (-1, 0, 0, 0)),
        ("Perhaps it might be wonderful! Surely it is plain.", (0, 0, 0, 0)),
        ("Maybe. Maybe. Maybe. Surely 7. On Monday", (1, 0.4, 0, 0.4)),
        ("We met on Friday at 1890 King Street", (-1, 1, 0, 0)),
        ("perhaps surely perhaps", (-1, 0, 0, 1)),
        # Its third sentence has two lively marks (a word, the "!") and two calm ones.
        ("Wonderful!!! Calm. A wonderful, calm, quiet wall!", (1, 0, 0, 0)),
        ("Wonderful! Calm. Nice!", (1, 0, 1 / 3, 0)),
    ],
)
def test_measure_reads_any_text(text: str, style: tuple[float, ...]) -> None:
    assert measure(text) == pytest.approx(style)


@pytest.mark.slow
def test_texts_are_short_varied_and_of_few_words(
    tables: dict[tuple[str, int], tuple[PersonasSource, Table]],
) -> None:
    rows = tables["individual", 0][1].rows
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    words = [len(text.split()) for text in texts]
    assert len(set(texts)) > 0.95 * len(texts)
    assert min(words) >= 9 and max(words) <= 54
    prompts = {row["prompt"] for row in rows}
    assert all(6 <= len(prompt.split()) <= 11 for prompt in prompts)
    assert len({word for text in (*texts, *prompts) for word in text.lower().split()}) < 600


@pytest.mark.slow
def test_attributes_are_independent_of_each_other_and_of_the_topic(
    tables: dict[tuple[str, int], tuple[PersonasSource, Table]],
) -> None:
    rows = tables["individual", 0][1].rows
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    styles = np.array([measure(text) for text in texts])
    correlations = np.corrcoef(styles.T) - np.eye(len(ATTRIBUTES))
    assert np.abs(correlations).max() < 0.06  # choices favour no combination of attributes
    things = np.array([row["prompt_id"].split("-")[0] for row in rows for _ in range(2)])
    for thing in np.unique(things):
        assert np.abs(styles[things == thing].mean(axis=0)).max() < 0.15


@pytest.mark.slow
def test_bag_of_words_decodes_attributes_on_new_topics(
    tables: dict[tuple[str, int], tuple[PersonasSource, Table]],
) -> None:
    table = tables["individual", 0][1]
    train = [row["chosen"] for row in table.rows if row["split"] == "train"][:2000]
    test = [row["chosen"] for row in table.rows if row["split"] == "test"]
    counts = CountVectorizer(token_pattern=r"\w+|!").fit(train)
    for j in range(len(ATTRIBUTES)):
        levels = [[measure(text)[j] for text in texts] for texts in (train, test)]
        probe = LogisticRegression(max_iter=300).fit(counts.transform(train), levels[0])
        assert probe.score(counts.transform(test), levels[1]) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_oracle_and_population_rule(
    tables: dict[tuple[str, int], tuple[PersonasSource, Table]], kind: str, seed: int
) -> None:
    table = tables[kind, seed][1]
    seen = np.isin(table.user, np.unique(table.user[table.split == "train"]))
    test, train = seen & (table.split == "test"), table.split == "train"
    population = bradley_terry_fit(table.difference[train], 1.0)
    assert 0.78 <= accuracy(table.margin[test]) <= 0.87
    assert 0.55 <= accuracy(table.difference[test] @ population) <= 0.65
    assert accuracy(table.difference[test, 0]) == pytest.approx(0.5, abs=0.05)  # length alone


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_choices_follow_bradley_terry(
    tables: dict[tuple[str, int], tuple[PersonasSource, Table]], kind: str
) -> None:
    margins = np.concatenate([tables[kind, seed][1].margin for seed in (0, 1, 2)])
    for low, high in itertools.pairwise((0, 0.5, 1, 2, 3, 4, 6)):
        near = (np.abs(margins) > low) & (np.abs(margins) <= high)
        expected = np.mean(1 / (1 + np.exp(-np.abs(margins[near]))))
        error = math.sqrt(expected * (1 - expected) / near.sum())
        assert abs(np.mean(margins[near] > 0) - expected) < 4 * error


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_margin_is_the_true_score_difference(kind: str) -> None:
    source = PersonasSource(kind=kind, seed=5, **SMALL)
    margins = source.oracle_margins()
    for _, row in source.records():
        user = row["user_id"]
        scores = [source.true_score(user, row[side]) for side in ("chosen", "rejected")]
        assert margins[row["pair_id"]] == pytest.approx(scores[0] - scores[1])
        assert scores[0] == pytest.approx(
            float(np.dot(source.true_vector(user), measure(row["chosen"])))
        )
    assert min(margins.values()) < 0 < max(margins.values())


@pytest.mark.slow
def test_regression_per_user_recovers_vector_and_gain(
    tables: dict[tuple[str, int], tuple[PersonasSource, Table]],
) -> None:
    source, table = tables["individual", 0]
    train, test = table.split == "train", table.split == "test"
    population = bradley_terry_fit(table.difference[train], 1.0)
    cosines, personal, shared, oracle = [], [], [], []
    for user in source.user_ids[:100]:
        mine = table.user == user
        fitted = bradley_terry_fit(table.difference[mine & train], 0.5)
        truth = np.array(source.true_vector(user))
        cosines.append(fitted @ truth / np.linalg.norm(fitted) / np.linalg.norm(truth))
        personal.append(accuracy(table.difference[mine & test] @ fitted))
        shared.append(accuracy(table.difference[mine & test] @ population))
        oracle.append(accuracy(table.margin[mine & test]))
    assert np.mean(cosines) > 0.95
    vanilla = np.mean(shared)
    assert (np.mean(personal) - vanilla) / (np.mean(oracle) - vanilla) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_rows_splits_and_users(kind: str) -> None:
    source = PersonasSource(kind=kind, val_pairs_per_user=2, test_pairs_per_user=5, seed=0, **SMALL)
    records = list(source.records())
    rows = [parse_row(raw, where) for where, raw in records]  # refuses what is no row
    by_split = {name: [r for r in rows if r.split == name] for name in ("train", "val", "test")}
    assert {name: len(part) for name, part in by_split.items()} == {
        "train": 7 * 11,
        "val": 7 * 2,
        "test": 10 * 5,
    }
    for field in ("prompt_id", "prompt"):
        parts = [{getattr(row, field) for row in part} for part in by_split.values()]
        assert sum(map(len, parts)) == len(set.union(*parts))
    assert {row.user_id for row in by_split["test"]} == set(source.user_ids)
    assert {row.user_id for row in by_split["train"]} == set(source.user_ids[:7])
    assert len({row.pair_id for row in rows}) == len(rows) == len(source.oracle_margins())
    assert all(measure(row.chosen) != measure(row.rejected) for row in rows)
    assert all((row.user_features is not None) == (kind == "features") for row in rows)
    assert all(where == f"personas:{raw['pair_id']}" for where, raw in records)


@pytest.mark.slow
def test_prompts_are_parted_seven_one_two() -> None:
    source = PersonasSource(kind="individual", n_prompts=200, n_users=60, seed=4)
    asked: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for _, row in source.records():
        asked[row["split"]].add(row["prompt_id"])
    assert {split: len(ids) for split, ids in asked.items()} == {
        "train": 140,
        "val": 20,
        "test": 40,
    }


def test_types_share_a_vector_and_individuals_do_not() -> None:
    clusters = PersonasSource(kind="clusters", n_users=37, n_types=3, seed=1)
    types = {user: clusters.true_type(user) for user in clusters.user_ids}
    assert set(types.values()) == {0, 1, 2}
    vectors = {(types[user], tuple(clusters.true_vector(user))) for user in types}
    assert len(vectors) == 3
    assert all(clusters.profile(user).startswith(f"Type {types[user]}. Pref") for user in types)
    assert all(clusters.group(user) == f"type {types[user]}" for user in types)
    individual = PersonasSource(kind="individual", n_users=37, seed=1)
    assert len({tuple(individual.true_vector(user)) for user in individual.user_ids}) == 57
    assert individual.true_type(individual.user_ids[0]) is None


@pytest.mark.slow
def test_features_alone_decide_the_vector() -> None:
    source = PersonasSource(kind="features", n_users=6000, pairs_per_user=1, seed=2)
    seen: dict[tuple[object, ...], list[float]] = {}
    repeats = 0
    for user in source.user_ids:
        key = tuple((source.features(user) or {}).values())
        repeats += key in seen
        assert seen.setdefault(key, source.true_vector(user)) == source.true_vector(user)
    assert repeats > 100 and len({tuple(vector) for vector in seen.values()}) == len(seen)


def test_profile_says_what_the_vector_says() -> None:
    source = PersonasSource(kind="individual", n_users=50, seed=0)
    for user in source.user_ids:
        vector = source.true_vector(user)
        strongest = int(np.argmax(np.abs(vector)))
        word = {
            "length": ("short", "long"),
            "detail": ("general", "concrete"),
            "enthusiasm": ("calm", "enthusiastic"),
            "hedging": ("confident", "cautious"),
        }[ATTRIBUTES[strongest]][int(vector[strongest] > 0)]
        assert source.profile(user).startswith(f"Prefers {word}")
        assert source.group(user) == f"prefers {word}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_world_in_another_process(kind: str) -> None:
    script = (
        "import json, sys; from plrhf.data.sources.personas import PersonasSource;"
        f"source = PersonasSource(kind={kind!r}, seed=9, **{SMALL!r});"
        "print(json.dumps([list(source.records()), source.oracle_margins()]))"
    )
    there = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    here = PersonasSource(kind=kind, seed=9, **SMALL)
    again = json.loads(json.dumps([list(here.records()), here.oracle_margins()]))
    assert json.loads(there.stdout) == again
    other = PersonasSource(kind=kind, seed=8, **SMALL)
    assert list(other.records()) != list(here.records())
    assert other.true_vector("ada-000") != here.true_vector("ada-000")


def test_more_pairs_and_users_leave_the_others_as_they_were() -> None:
    few = PersonasSource(kind="features", seed=0, **SMALL)
    more = PersonasSource(
        kind="features", seed=0, val_pairs_per_user=30, **(SMALL | {"n_unseen_users": 9})
    )
    few_rows, more_rows = (
        [row for _, row in source.records() if row["split"] != "val"] for source in (few, more)
    )
    kept = [row for row in more_rows if row["user_id"] in few.user_ids]
    assert kept == few_rows


@pytest.mark.slow
def test_rows_of_the_default_world() -> None:
    assert len(list(PersonasSource(kind="clusters").records())) == 100 * 130 + 20 * 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": "types"},
            "data.kind='types' is not allowed: expected individual, clusters, features or "
            "strangers. Set data.kind=individual.",
        ),
        (
            {"n_users": 0},
            "data.n_users=0 is not allowed: expected a whole number from 1. Set data.n_users=100.",
        ),
        (
            {"n_unseen_users": -1},
            "data.n_unseen_users=-1 is not allowed: expected a whole number from 0. "
            "Set data.n_unseen_users=20.",
        ),
        (
            {"pairs_per_user": True},
            "data.pairs_per_user=True is not allowed: expected a whole number from 1. "
            "Set data.pairs_per_user=100.",
        ),
        (
            {"n_prompts": 481},
            "data.n_prompts=481 is not allowed: expected a whole number from 3 to 480. "
            "Set data.n_prompts=300.",
        ),
        (
            {"kind": "clusters", "n_types": 1},
            "data.n_types=1 is not allowed: expected a whole number from 2. Set data.n_types=4.",
        ),
        (
            {"scale": float("nan")},
            "data.scale=nan is not allowed: expected a number above 0. Set data.scale=1.8.",
        ),
        (
            {"seed": 0.5},
            "data.seed=0.5 is not allowed: expected a whole number from 0. Set data.seed=0.",
        ),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        PersonasSource(**({"kind": "individual"} | arguments))
    assert str(error.value) == message


def test_unknown_user() -> None:
    source = PersonasSource(kind="individual", n_users=2, n_unseen_users=0)
    with pytest.raises(ValueError) as error:
        source.profile("zoe-999")
    assert str(error.value) == (
        "user_id='zoe-999' is not allowed: expected one of the 2 users ada-000 to ben-001. "
        "Take an id from the rows of this world."
    )


def test_worlds_share_an_id_only_where_they_share_the_pair() -> None:
    def pairs(**changes: Any) -> dict[str, tuple[str, ...]]:
        size = {"n_users": 8, "n_unseen_users": 2, "pairs_per_user": 10, "test_pairs_per_user": 3}
        source = PersonasSource(**{"kind": "individual", "n_prompts": 20, **size, **changes})
        fields = ("prompt", "chosen", "rejected", "user_id")
        return {raw["pair_id"]: tuple(raw[one] for one in fields) for _, raw in source.records()}

    ours = pairs()
    for changes in ({"scale": 0.5}, {"n_prompts": 30}):
        theirs = pairs(**changes)
        shared = ours.keys() & theirs.keys()
        assert len(shared) < len(ours)
        assert all(ours[one] == theirs[one] for one in shared)


def test_strangers_differ_where_no_seen_user_does() -> None:
    source = PersonasSource(kind="strangers", n_users=9, n_unseen_users=7, seed=3)
    mean = source.scale * np.array(source.population_mean)
    apart = np.array([source.true_vector(user) for user in source.user_ids]) - mean
    np.testing.assert_allclose(np.linalg.norm(apart, axis=1), source.scale)
    np.testing.assert_allclose(apart[:9] @ apart[9:].T, 0, atol=1e-12)
    assert np.linalg.matrix_rank(apart[:9]) == np.linalg.matrix_rank(apart[9:]) == 2
