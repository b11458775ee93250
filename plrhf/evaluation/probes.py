"""Leak probes: what predicts choices without knowing the user. They run with every training.

Published gains have come from formats that held the label and from rows in two splits. So what a model
could have used instead of the user is measured and reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plrhf.core.bootstrap import Array, Estimate
from plrhf.core.stats import Outcomes, correctness, summarise_outcomes
from plrhf.data.rows import SPLITS, Row, choices_of
from plrhf.data.splits import SPLIT_PAIRS, Splits, prompt_keys

MOST_PAIRS = 20_000  # of a split, spread evenly: more would cost time and change no digit
HELD_OUT = 5  # every fifth train pair is scored where val cannot be
MOSTLY_KNOWN = 0.9  # share of pairs
RIDGE = 1.0  # penalty on weights of standardised features, half its square
NEWTON_STEPS = 25

Hashes = NDArray[np.int64]

CHARACTERS = ",.!?:;-–()[]{}\"'`*#_|/\\\t\n"
MARKS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\A\s",
        r"\s\Z",
        r"\S  +\S",
        r"\n\s*\n",
        r"(?m)^\s*[-*•]\s",
        r"(?m)^\s*\d+[.)]\s",
        r"(?m)^#{1,6}\s",
        r"\*\*|__",
        r"```",
        r"https?://|\]\(",
        r"\A\s*[\[{(\"']",
        r"[\]})\"']\s*\Z",
        r"\A\s*[A-Z]",
        r"[.!?]\s*\Z",
        r"\b[A-Z]{2,}\b",
        r"\d",
        r"[^\x00-\x7f]",
    )
)
CAPITALS = re.compile(r"[A-Z]")


def probe(splits: Splits) -> dict[str, Any]:
    """Compute the key ``probes`` of results.json; it is empty without train rows.

    Returns:
        ``overlap``: for each two splits, how many pairs of the later one share a user, prompt and so
        on with the earlier one. ``format_only`` and ``length_only``: accuracy of a classifier that is
        fitted on train and sees nothing else. It is ``scored_on`` val or, if val has fewer than two
        users, on a held-out part of train. ``warnings``: a line for each probe that found something or
        could not be run.
    """
    if len(splits.train) == 0:
        return {}
    found: dict[str, Any] = {
        "overlap": overlap(splits),
        "format_only": blind_accuracy(splits, format_features),
        "length_only": blind_accuracy(splits, length_features),
    }
    return {**found, "warnings": warnings(found, shared_prompts=splits.shared_prompts)}


def overlap(splits: Splits) -> dict[str, dict[str, int]]:
    """Count the pairs of each split that share something with an earlier split.

    ``unseen_user``: pairs of an unseen user whose id the earlier split has, up to case and spaces.
    ``prompt``: same prompt id or text. ``response``: one response in common. ``pair``: same prompt and
    responses, in any order. ``judgment``: same pair and user.
    """
    hashes = {name: _hashes(getattr(splits, name)) for name in SPLITS}
    seen = np.fromiter(map(hash, splits.users), np.int64)
    found = {}
    for earlier, later in SPLIT_PAIRS:
        before, after = hashes[earlier], hashes[later]
        shared = {
            name: np.isin(of_later, before[name]).any(axis=1) for name, of_later in after.items()
        }
        unseen = ~np.isin(after["user"], seen)[:, 0]
        found[f"{earlier}_{later}"] = {
            "pairs": len(unseen),
            "unseen_user": int((shared.pop("name") & unseen).sum()),
            **{name: int(where.sum()) for name, where in shared.items()},
        }
    return found


KEYS = {"name": 1, "user": 1, "prompt": 2, "response": 2, "pair": 1, "judgment": 1}
"""Number of keys of each kind that `_keys` yields, in this order; `name` is the normalised user id."""


def _keys(row: Row) -> Iterator[Hashable]:
    """Yield the keys of a row; rows that share something have a key in common."""
    yield row.user_id.strip().casefold()
    yield row.user_id
    yield from prompt_keys(row)
    yield from (row.chosen, row.rejected)
    pair = (str(row.prompt), *sorted((row.chosen, row.rejected)))
    yield pair
    yield row.user_id, pair


def _hashes(rows: Sequence[Row]) -> dict[str, Hashes]:
    """Hash the keys of each row to 64 bits, [N, 1 or 2] for each kind of key."""
    n_keys = sum(KEYS.values())
    keys = (hash(key) for row in rows for key in _keys(row))
    table = np.fromiter(keys, np.int64, len(rows) * n_keys).reshape(len(rows), n_keys)
    ends = np.cumsum(list(KEYS.values()))
    return dict(zip(KEYS, np.split(table, ends[:-1], axis=1), strict=True))


def format_features(text: str) -> list[float]:
    """Measure the format of a text, apart from content and length: markup, punctuation, case."""
    rates = [text.count(character) / len(text) for character in CHARACTERS]
    capitals = len(CAPITALS.findall(text)) / len(text)
    return [*rates, capitals, *(float(mark.search(text) is not None) for mark in MARKS)]


def length_features(text: str) -> list[float]:
    """Count the characters and words of a text, also as logarithms."""
    sizes = (len(text), len(text.split()))
    return [*map(float, sizes), *np.log(sizes)]


def blind_accuracy(splits: Splits, features: Callable[[str], list[float]]) -> dict[str, Any]:
    """Fit a Bradley-Terry model to features of the responses on train, and estimate its accuracy.

    It is scored on val, of whose pairs a share has ``known_texts``, in pairs that it is fitted on. An
    interval needs two users, so if val has fewer, every fifth train pair is
    held out and scored. If train has a single user as well, ``not_run`` says so.
    """
    train, val = (_spread(choices_of(rows)) for rows in (splits.train, splits.val))
    scored_on = "val"
    if _n_users(val) < 2 and _n_users(train[::HELD_OUT]) >= 2:
        scored_on = "held-out train pairs"
        val = train[::HELD_OUT]
        train = [row for place, row in enumerate(train) if place % HELD_OUT != 0]
    values: dict[str, list[float]] = {}
    for row in (*train, *val):
        for text in (row.chosen, row.rejected):
            if text not in values:
                values[text] = features(text)

    def differences(rows: Sequence[Row]) -> Array:
        chosen, rejected = (
            np.array([values[getattr(row, name)] for row in rows])
            for name in ("chosen", "rejected")
        )
        return np.asarray(chosen - rejected, dtype=np.float64)

    not_run = None
    if _n_users(val) < 2:
        not_run = f"{_n_users(val)} of the two users that an interval needs could be scored"
    margin = np.zeros(0)
    if len(val) > 0 and len(train) > 0:
        margin = differences(val) @ fit_bradley_terry(differences(train))
    found = _accuracy(val if len(margin) > 0 else [], margin)
    fitted_on = {text for row in train for text in (row.chosen, row.rejected)}
    n_known = sum(row.chosen in fitted_on and row.rejected in fitted_on for row in val)
    known = n_known / len(val) if len(val) > 0 else None
    return {**found, "known_texts": known, "scored_on": scored_on, "not_run": not_run}


def fit_bradley_terry(differences: Array) -> Array:
    """Find the weights w that minimise sum log(1 + exp(-d . w)) + RIDGE / 2 |s * w|^2, [N, F] -> [F].

    d are the feature differences chosen - rejected, and s their root mean squares. It is Newton's
    method, started at 0.
    """
    scale = np.sqrt((differences**2).mean(axis=0))
    scaled = differences / np.where(scale > 0, scale, 1.0)
    weights = np.zeros(scaled.shape[1])
    for _ in range(NEWTON_STEPS):
        wrong = 1.0 / (1.0 + np.exp(np.clip(scaled @ weights, -50, 50)))
        gradient = RIDGE * weights - scaled.T @ wrong
        curvature = (scaled.T * (wrong * (1 - wrong))) @ scaled + RIDGE * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    return np.asarray(weights / np.where(scale > 0, scale, 1.0))


def warnings(found: Mapping[str, Any], *, shared_prompts: Collection[str]) -> list[str]:
    """Return a line for each probe that found something.

    On a fixed set of items, where people judge the same prompts and texts in all splits, neither common
    prompts nor what can be told of a text by its format are a leak.

    Args:
        found: the results of the probes.
        shared_prompts: of which two splits common prompts were asked for.
    """
    lines = []
    for name, what in (
        ("unseen_user", "of users called unseen, whom {} has"),
        ("prompt", "on prompts of {}"),
        ("judgment", "choices that the same user makes in {}"),
    ):
        shares = []
        for pair, counts in found["overlap"].items():
            earlier, later = pair.split("_")
            fixed = pair in shared_prompts or counts[name] == counts["pairs"]
            wanted = name == "prompt" and fixed
            if counts[name] > 0 and not wanted:
                of_all = f"{counts[name]:,} of {counts['pairs']:,} {later} pairs"
                shares.append(f"{of_all} are {what.format(earlier)}")
        if len(shares) > 0:
            lines.append(f"probe {name}: {'; '.join(shares)}")
    for name in ("format_only", "length_only"):
        if found[name]["not_run"] is not None:
            lines.append(f"probe {name}: not run, as {found[name]['not_run']}")
        estimate: Estimate = found[name]["accuracy"]
        fixed = (found[name]["known_texts"] or 0.0) >= MOSTLY_KNOWN
        if estimate["ci95"] is not None and estimate["ci95"][0] > 0.5 and not fixed:
            low, high = (100 * end for end in estimate["ci95"])
            lines.append(
                f"probe {name}: fitted on train, it alone gets {100 * (estimate['value'] or 0):.1f}% "
                f"[{low:.1f}, {high:.1f}] of {_pairs(found[name])} right: a leak, or a taste "
                "that everybody shares"
            )
    return lines


def _pairs(found: Mapping[str, Any]) -> str:
    """Say which pairs a probe was scored on."""
    return "val pairs" if found["scored_on"] == "val" else str(found["scored_on"])


def _n_users(rows: Sequence[Row]) -> int:
    """Count the users of rows."""
    return len({row.user_id for row in rows})


def _spread(rows: Sequence[Row]) -> Sequence[Row]:
    """Return at most `MOST_PAIRS` rows at even distances."""
    return rows[:: max(1, -(-len(rows) // MOST_PAIRS))]


def _accuracy(rows: Sequence[Row], margin: Array) -> dict[str, Any]:
    """Return the accuracy of margins on rows, with an interval if there are two users."""
    outcomes = Outcomes(
        pair_id=np.array([row.pair_id for row in rows], dtype=object),
        user_id=np.array([row.user_id for row in rows], dtype=object),
        margin=margin,
        correct=correctness(margin),
    )
    summary = summarise_outcomes(outcomes, names=("accuracy_micro",))
    counts = {name: summary[name] for name in ("n_pairs", "n_users")}
    return {"accuracy": summary["accuracy_micro"], **counts}
