"""From margins to the leaderboard, and the command that does all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from plrhf.cli.forget import forget_in_referee
from plrhf.core.stats import Outcomes, correctness
from plrhf.referee.leaderboard import (
    Entry,
    entries,
    lines,
    new_users_gain,
    rank_intervals,
    stability,
)
from plrhf.referee.page import write_leaderboard
from plrhf.referee.store import JobRecord, Store


def outcomes(accuracies: list[float], n_pairs: int = 10) -> Outcomes:
    """Users who are right in this share of their pairs."""
    margin = np.concatenate(
        [np.where(np.arange(n_pairs) < round(n_pairs * one), 1.0, -1.0) for one in accuracies]
    )
    users = np.repeat([f"u{n}" for n in range(len(accuracies))], n_pairs)
    return Outcomes(np.arange(len(margin)), users, margin, correctness(margin))


def test_ranks_and_their_intervals() -> None:
    generator = np.random.default_rng(0)
    base = generator.uniform(0.4, 0.6, 30).round(1)
    methods = {
        "best": outcomes((base + 0.3).tolist()),
        "same": outcomes(base.tolist()),
        "twin": outcomes(generator.permutation(base).tolist()),
    }
    ranks = rank_intervals(methods)
    assert ranks["best"] == {"value": 1.0, "ci95": [1.0, 1.0]}
    assert ranks["same"]["value"] == ranks["twin"]["value"] == 2.0  # a tie: nobody between
    assert ranks["same"]["ci95"] == [2.0, 3.0]
    with pytest.raises(ValueError, match="other numbers of users"):
        rank_intervals({**methods, "few": outcomes([0.5, 0.5])})


def job(method: str, seed: int, right: float, *, world: str | None = None) -> Any:
    """A job whose margins are right in this share of pairs."""
    generator = np.random.default_rng(seed * 17 + len(method))
    users = [f"u{n % 20}" for n in range(200)]
    base: dict[str, Any] = {
        "user_kind": "seen",
        "shots": -1,
        "draw": 0,
        "pair_id": [f"p{n}" for n in range(200)],
        "user_id": users,
        "agreed": [n % 2 == 0 for n in range(200)],
    }
    frames = [
        pd.DataFrame({**base, "who": who, "margin": np.where(generator.random(200) < p, 1.0, -1.0)})
        for who, p in (("own", right), ("generic", 0.6), ("wrong", 0.5))
    ]
    record = JobRecord(
        rows="rows",
        method=method,
        features="text",
        seed=seed,
        fingerprint="f",
        halvings=[0.5],
        world=world,
        personal=True,
        trials=[{"point": {}, "val_loss": 0.5, "val_accuracy": 0.7, "step": 3, "n_steps": 4}],
        best=0,
        vmapped=True,
        seconds=1.0,
        seconds_per_user=0.1,
        numbers_per_user=2,
    )
    return record, pd.concat(frames, ignore_index=True)


def test_lines_are_ordered_by_accuracy_over_all_seeds() -> None:
    made = [job("vanilla", s, 0.6) for s in (0, 1)] + [job("good", s, 0.95) for s in (0, 1)]
    (found,) = entries([*made, *(job("middle", s, 0.8) for s in (0, 1))]).values()
    first, second, third = lines(found)
    assert [one.entry.method for one in (first, second, third)] == ["good", "middle", "vanilla"]
    assert first.measures["n_pairs"] == 400 and first.measures["n_users"] == 20
    gain = first.over_vanilla["value"]
    assert gain == pytest.approx(
        first.measures["accuracy_micro"]["value"] - third.measures["accuracy_micro"]["value"]
    )
    assert (first.p_value or 1) < 0.01 and third.p_value is None
    assert first.wrong is not None and first.agreed is not None and first.gain is None
    assert stability(found, "seen") == pytest.approx(1.0)


def test_the_share_of_the_oracles_gain_on_new_users_is_over_vanilla() -> None:
    right = {"vanilla": (0.6, 0.6), "good": (0.5, 0.8)}  # after 0 and 4 pairs
    made = []
    for method, (before, after) in right.items():
        record, _ = job(method, 0, 0.7)
        base = {"user_kind": "unseen", "draw": 0, "agreed": False}
        base |= {"pair_id": [f"p{n}" for n in range(40)], "user_id": ["a", "b"] * 20}
        asked = (("own", 0, before), ("own", 4, after), ("oracle", 0, 0.9))
        margins = [
            pd.DataFrame(
                {
                    **base,
                    "who": who,
                    "shots": k,
                    "margin": np.where(np.arange(40) < 40 * p, 1.0, -1.0),
                }
            )
            for who, k, p in asked
        ]
        made.append((record, pd.concat(margins, ignore_index=True)))
    (found,) = entries(made).values()
    vanilla, good = found
    assert new_users_gain(vanilla, vanilla, 0) is None and new_users_gain(good, None, 4) is None
    for k, share in ((0, (0.5 - 0.6) / 0.3), (4, (0.8 - 0.6) / 0.3)):
        gain = new_users_gain(good, vanilla, k)
        assert gain is not None and gain["value"] == pytest.approx(share)


def test_people_of_two_worlds_are_not_the_same() -> None:
    found = entries([job("m", seed, 0.7, world=str(seed)) for seed in (0, 1)])
    (entry,) = found["rows"]
    assert isinstance(entry, Entry)
    assert len(set(entry.outcomes("seen").user_id)) == 40


def test_a_store_keeps_what_was_done(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record, margins = job("m", 3, 0.7)
    assert not store.has("rows", "m", 3, "f")
    store.write(record, margins)
    assert store.has("rows", "m", 3, "f") and not store.has("rows", "m", 3, "g")
    ((again, read),) = Store(tmp_path).jobs()
    assert again.model_copy(update={"files": {}}) == record
    pd.testing.assert_frame_equal(read, margins)
    (
        store.path("rows", "m", 3) / "job.json"
    ).unlink()  # a run that was killed between the two files
    assert not store.has("rows", "m", 3, "f") and list(store.jobs()) == []


def test_damaged_margins_are_computed_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(*job("m", 3, 0.7))
    path = store.path("rows", "m", 3) / "margins.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    for read in (store.jobs, lambda: store.forget("u7")):
        with pytest.raises(ValueError, match=r"margins.parquet=.*damaged.*Repeat eval=referee"):
            list(read())
    assert not store.has("rows", "m", 3, "f")


def test_a_person_is_taken_out_of_a_comparison(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for method in ("vanilla", "good"):
        store.write(*job(method, 0, 0.7))
    write_leaderboard(tmp_path, store)
    page = (tmp_path / "report.html").read_text()
    said = list(forget_in_referee(tmp_path, "u7"))
    # 10 pairs, each as own, generic and wrong
    assert said == [
        f"30 margins in jobs/rows/{name}/0/margins.parquet" for name in ("good", "vanilla")
    ]
    for _, margins in store.jobs():
        assert set(margins["user_id"]) == {f"u{n}" for n in range(20) if n != 7}
    assert (tmp_path / "report.html").read_text() != page
    assert list(forget_in_referee(tmp_path, "u7")) == []
    with pytest.raises(ValueError, match=r"^referee=.* the directory of a comparison"):
        list(forget_in_referee(tmp_path / "jobs", "u7"))
