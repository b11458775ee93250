"""A library's recommenders beside reward models: on votes of people on texts, by ids alone.

    python benchmarks/recommenders.py ../shared/data/polis_bowling_green.jsonl.gz
    python benchmarks/recommenders.py ROWS --seeds 0 --votes votes.jsonl
    python benchmarks/recommenders.py ROWS --seeds 0 --runs runs/votes
    python benchmarks/recommenders.py ROWS --seeds 0 --new new_texts.jsonl --new-fraction 0.3

needs the library Surprise (``pip install scikit-surprise``), no dependency. Rows are pairs of a text
that a person agreed to and one that they disagreed with; train pairs are taken apart into votes, 1 and 0.
Rows are divided as the referee divides them. Each way predicts votes, and a pair by the difference of two:
``item means`` (a text's votes, shrunk to the mean of all), and Surprise's ``SVD`` (biased matrix
factorisation by stochastic gradient descent), with 12 settings, of which val pairs choose one.

`--votes` writes the votes of all splits as ratings, on which a reward model can be trained; `--runs` asks
reward models the same test pairs. `--new` writes rows in which a share of the texts is in test alone, in
pairs of two such texts, of which ids can tell nothing.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import plrhf
from plrhf.core.bootstrap import bootstrap
from plrhf.data.module import PreferenceData
from plrhf.data.rows import Row
from plrhf.data.sources.jsonl import JsonlSource
from plrhf.models.reward import PersonalRewardModel

Votes = dict[tuple[str, str], float]
"""Whether a person agreed with a text, 1 or 0, by user id and text."""

GRID: dict[str, list[Any]] = {
    "n_factors": [8, 16, 32],
    "reg_all": [0.05, 0.1],
    "n_epochs": [100, 200],
}
PRIOR_VOTES = 2.0  # of the mean of all votes, in an item's mean


def votes_of(rows: Sequence[Row]) -> Votes:
    """Take pairs apart into the votes that they are made of."""
    found = {(row.user_id, str(row.chosen)): 1.0 for row in rows}
    return {**found, **{(row.user_id, str(row.rejected)): 0.0 for row in rows}}


def item_means(votes: Votes) -> Callable[[str, str], float]:
    """Predict a vote by the mean of all votes on the text, shrunk to the mean of all votes."""
    mean = float(np.mean([*votes.values()]))
    sums: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, float] = defaultdict(float)
    for (_, text), vote in votes.items():
        sums[text] += vote
        counts[text] += 1
    return lambda user, text: (sums[text] + PRIOR_VOTES * mean) / (counts[text] + PRIOR_VOTES)


def factorisation(votes: Votes, seed: int, **settings: Any) -> Callable[[str, str], float]:
    """Predict a vote by Surprise's SVD."""
    from surprise import SVD, Dataset, Reader  # type: ignore[import-not-found,unused-ignore]

    raw = [(user, text, vote, None) for (user, text), vote in votes.items()]
    reader = Reader(rating_scale=(-5, 6))  # so that predictions are not clipped to 0 and 1
    data = Dataset(reader)
    model = SVD(random_state=seed, **settings).fit(data.construct_trainset(raw))
    return lambda user, text: float(model.predict(user, text, clip=False).est)


def correct(predict: Callable[[str, str], float], rows: Sequence[Row]) -> NDArray[np.float64]:
    """Return 1 where a pair is in the right order, 0 where not, 0.5 for ties, [N]."""
    margins = [
        predict(r.user_id, str(r.chosen)) - predict(r.user_id, str(r.rejected)) for r in rows
    ]
    found: NDArray[np.float64] = (np.sign(margins) + 1) / 2
    return found


def best_factorisation(data: PreferenceData, seed: int) -> tuple[Callable[[str, str], float], str]:
    """Fit all settings of `GRID`, and return the one that is best on val, and its settings."""
    votes, val = votes_of(data.splits.train), list(data.splits.val)
    found = []
    for values in product(*GRID.values()):
        settings = dict(zip(GRID, values, strict=True))
        predict = factorisation(votes, seed, **settings)
        found.append((float(correct(predict, val).mean()), settings, predict))
    score, settings, predict = max(found, key=lambda one: one[0])
    return predict, f"{settings}, {score:.1%} on val"


def by_run(run: str, rows: Sequence[Row]) -> Callable[[str, str], float]:
    """Predict by a reward model, of which all texts of these rows are asked at once."""
    model = plrhf.load(run)
    assert isinstance(model, PersonalRewardModel)
    asked = [{"prompt": row.prompt, "user_id": row.user_id} for row in rows]
    given = [
        {**one, "response": str(text)}
        for one, row in zip(asked, rows, strict=True)
        for text in (row.chosen, row.rejected)
    ]
    distinct = {(str(one["user_id"]), str(one["response"])): one for one in given}
    rewards = model.score([*distinct.values()], batch_size=4096).tolist()
    found = dict(zip(distinct, rewards, strict=True))
    return lambda user, text: found[user, text]


def summary(right: NDArray[np.float64], users: Sequence[str]) -> str:
    """Write the accuracy over pairs in per cent, with a 95% interval over users."""
    person = np.unique(users, return_inverse=True)[1]
    won, asked = np.bincount(person, right), np.bincount(person)
    share = {"share": lambda weights: weights @ won / (weights @ asked)}
    found = bootstrap(share, n_users=len(asked))["share"]
    low, high = found["ci95"] or (float("nan"), float("nan"))
    return f"{100 * right.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def write_new(path: Path, rows: Sequence[Row], *, fraction: float, seed: int) -> None:
    """Write rows of which pairs of two held-out texts are test, and the others without them."""
    texts = sorted({str(text) for row in rows for text in (row.chosen, row.rejected)})
    is_out = np.random.default_rng(seed).random(len(texts)) < fraction
    out = {text for text, held in zip(texts, is_out, strict=True) if held}
    kept = []
    for row in rows:
        n_out = sum(str(text) in out for text in (row.chosen, row.rejected))
        split = {0: row.split if row.split == "val" else "train", 2: "test"}.get(n_out)
        if split is not None:
            one = {name: value for name, value in asdict(row).items() if value is not None}
            kept.append({**one, "split": split})
    path.write_text("".join(json.dumps(one) + "\n" for one in kept))


def write_votes(path: Path, data: PreferenceData) -> None:
    """Write the votes of seen users as ratings, in the split of their pairs."""
    lines = []
    for split in ("train", "val", "test"):
        rows = [row for row in getattr(data.splits, split) if row.user_id in data.user_index]
        same = {"prompt": rows[0].prompt, "prompt_id": rows[0].prompt_id, "split": split}
        for (user, text), vote in votes_of(rows).items():
            own = {"response": text, "rating": int(vote), "user_id": user}
            lines.append(json.dumps({**same, **own}) + "\n")
    path.write_text("".join(lines))


def read(path: str, seed: int) -> PreferenceData:
    """Read and divide rows as the referee does."""
    how: dict[str, Any] = {"min_pairs_per_user": 20, "unseen_fraction": 0.15}
    source = JsonlSource(path=path)
    return PreferenceData(source=source, seed=seed, batch_size=1, eval_batch_size=1, **how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--new", type=Path, default=None, help="write rows of new texts, and stop")
    parser.add_argument("--votes", type=Path, default=None, help="write votes, and stop")
    parser.add_argument("--runs", nargs="*", default=[], help="reward models of the one seed")
    parser.add_argument("--new-fraction", type=float, default=0.3)
    given = parser.parse_args()
    right: defaultdict[str, list[NDArray[np.float64]]] = defaultdict(list)
    users: list[str] = []
    for seed in given.seeds:
        data = read(given.rows, seed)
        if given.new is not None:
            splits = (data.splits.train, data.splits.val, data.splits.test)
            rows = [row for split in splits for row in split]
            write_new(given.new, rows, fraction=given.new_fraction, seed=seed)
            return
        if given.votes is not None:
            write_votes(given.votes, data)
            return
        test = [row for row in data.splits.test if row.user_id in data.user_index]
        users += [row.user_id for row in test]
        predict, settings = best_factorisation(data, seed)
        print(f"seed {seed}: {len(test)} test pairs; SVD {settings}", flush=True)
        right["item means"].append(correct(item_means(votes_of(data.splits.train)), test))
        right["SVD"].append(correct(predict, test))
        for run in given.runs:
            right[run].append(correct(by_run(run, test), test))
            lead = right[run][-1] - right["SVD"][-1]
            print(f"{run} less SVD: {summary(lead, [row.user_id for row in test])}")
    for name, found in right.items():
        print(f"{name}: {summary(np.concatenate(found), users)} of {len(set(users))} people")


if __name__ == "__main__":
    main()
