"""What gives choices away without the person: probes of the rows, run with every training.

Published gains have come from formats that held the label and from rows in two splits, so what a
model could have used instead of the person is measured beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from plrhf.data.rows import Row
from plrhf.data.splits import Splits, prompt_keys
from plrhf.stats import Array, Estimate, Outcomes, correctness, summarise_outcomes

MOST_PAIRS = 20_000  # of a split, spread evenly: more would cost time and change no digit
RIDGE = 1.0  # penalty on weights of standardised features, half its square
NEWTON_STEPS = 25
SPLIT_PAIRS = (("train", "val"), ("train", "test"), ("val", "test"))

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
    """The key ``probes`` of results.json; empty without train rows, where nothing can be fitted.

    Returns:
        ``overlap``: for two splits, how many pairs of the later one share a user, prompt, ... with
        the earlier; ``format_only`` and ``length_only``: accuracy on val of a classifier fitted on
        train that sees nothing else; ``warnings``: a line for each probe that found something.
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
    """Pairs of one split that share something with an earlier split, by what they share.

    ``unseen_user``: of a user called unseen whom the earlier split has, by id up to case and
    spaces; ``prompt``: by id or text; ``response``: either one; ``pair``: prompt and both
    responses, in any order; ``judgment``: the same, and by the same user.
    """
    seen = set(splits.users)
    keys: dict[str, Callable[[Row], Iterable[Hashable]]] = {
        "user": lambda row: (row.user_id,),
        "prompt": prompt_keys,
        "response": lambda row: (row.chosen, row.rejected),
        "pair": lambda row: (_pair(row),),
        "judgment": lambda row: ((row.user_id, _pair(row)),),
    }
    found = {}
    for earlier, later in SPLIT_PAIRS:
        before, after = getattr(splits, earlier), getattr(splits, later)
        unseen = [row for row in after if row.user_id not in seen]
        found[f"{earlier}_{later}"] = {
            "pairs": len(after),
            "unseen_user": _shared(before, unseen, lambda row: (row.user_id.strip().casefold(),)),
            **{name: _shared(before, after, keys_of) for name, keys_of in keys.items()},
        }
    return found


def _pair(row: Row) -> Hashable:
    return str(row.prompt), frozenset((row.chosen, row.rejected))


def _shared(
    before: Sequence[Row], after: Sequence[Row], keys_of: Callable[[Row], Iterable[Hashable]]
) -> int:
    known = {key for row in before for key in keys_of(row)}
    return sum(not known.isdisjoint(keys_of(row)) for row in after)


def format_features(text: str) -> list[float]:
    """How a text is set, not what it says nor how long it is: marks, rates of punctuation, case."""
    rates = [text.count(character) / len(text) for character in CHARACTERS]
    capitals = len(CAPITALS.findall(text)) / len(text)
    return [*rates, capitals, *(float(mark.search(text) is not None) for mark in MARKS)]


def length_features(text: str) -> list[float]:
    """Characters and words, plain and as logarithms."""
    sizes = (len(text), len(text.split()))
    return [*map(float, sizes), *np.log(sizes)]


def blind_accuracy(splits: Splits, features: Callable[[str], list[float]]) -> dict[str, Any]:
    """Accuracy on val of a Bradley-Terry model on features of the responses, fitted on train."""
    train, val = (_spread(rows) for rows in (splits.train, splits.val))
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

    if len(val) == 0:
        return _accuracy(val, np.zeros(0))
    return _accuracy(val, differences(val) @ fit_bradley_terry(differences(train)))


def fit_bradley_terry(differences: Array) -> Array:
    """Weights w that minimise sum log(1 + exp(-d . w)) + RIDGE / 2 |s * w|^2, [N, F] -> [F].

    d are feature differences chosen - rejected, s their root mean squares; Newton's method from 0.
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


def warnings(found: Mapping[str, Any], *, shared_prompts: bool) -> list[str]:
    """A line naming each probe that found something.

    Args:
        found: the probes' results. shared_prompts: test was meant to hold prompts of train.
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
            wanted = name == "prompt" and pair == "train_test" and shared_prompts
            if counts[name] > 0 and not wanted:
                of_all = f"{counts[name]:,} of {counts['pairs']:,} {later} pairs"
                shares.append(f"{of_all} are {what.format(earlier)}")
        if len(shares) > 0:
            lines.append(f"probe {name}: {'; '.join(shares)}")
    for name in ("format_only", "length_only"):
        estimate: Estimate = found[name]["accuracy"]
        if estimate["ci95"] is not None and estimate["ci95"][0] > 0.5:
            low, high = (100 * end for end in estimate["ci95"])
            lines.append(
                f"probe {name}: fitted on train, it alone gets {100 * (estimate['value'] or 0):.1f}% "
                f"[{low:.1f}, {high:.1f}] of val pairs right: a leak, or a taste that everybody shares"
            )
    return lines


def _spread(rows: Sequence[Row]) -> Sequence[Row]:
    return rows[:: max(1, -(-len(rows) // MOST_PAIRS))]


def _accuracy(rows: Sequence[Row], margin: Array) -> dict[str, Any]:
    outcomes = Outcomes(
        pair_id=np.array([row.pair_id for row in rows], dtype=str),
        user_id=np.array([row.user_id for row in rows], dtype=str),
        margin=margin,
        correct=correctness(margin),
    )
    summary = summarise_outcomes(outcomes, names=("accuracy_micro",))
    counts = {name: summary[name] for name in ("n_pairs", "n_users")}
    return {"accuracy": summary["accuracy_micro"], **counts}
