"""From margins on test pairs to the leaderboard: every measure with its interval, differences, ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from plrhf.core.bootstrap import Array, Estimate, bootstrap, holm
from plrhf.core.stats import (
    STATISTICS,
    Outcomes,
    accuracy_micro,
    correctness,
    gain_recovered,
    paired_difference,
    paired_test,
    summarise_outcomes,
    user_sums,
)
from plrhf.referee.store import JobRecord

N_RESAMPLES = 1000
VANILLA, LENGTH, OWN_LENGTH, SHAPE, ITEMS = (
    *("vanilla", "length", "own_length", "shape"),
    "factorisation",
)
"""Methods that others are read against, by their files in ``conf/experiment/method``."""

LEAK = 0.02
"""How much better than length alone the shape of texts may tell the choice before it is called a leak."""


@dataclass(frozen=True)
class Entry:
    """A method on some rows: its records and margins by seed."""

    method: str
    records: list[JobRecord]
    margins: (
        pd.DataFrame
    )  # columns of `protocol.MARGINS`, ``agreed``, ``seed``, ``person``, ``pair``

    def outcomes(
        self, kind: str, who: str = "own", *, shots: int | None = None, seed: int | None = None
    ) -> Outcomes:
        """Return the outcomes of one kind of user, over all seeds or of one.

        A user is the same person in every seed unless the seed makes another world.
        """
        rows = self.margins
        taken = (rows["user_kind"] == kind) & (rows["who"] == who)
        if shots is not None:
            taken &= rows["shots"] == shots
        if seed is not None:
            taken &= rows["seed"] == seed
        return outcomes_of(rows[taken])

    def shots(self) -> list[int]:
        """Return the numbers of pairs given of unseen users."""
        rows = self.margins
        own = rows[(rows["user_kind"] == "unseen") & (rows["who"] == "own")]
        return sorted(own["shots"].unique().tolist())

    @property
    def halvings(self) -> str:
        """The shares of the steps after which the worse half of the trials stopped, as "0.25 0.5"."""
        told = {" ".join(map(str, record.halvings)) for record in self.records}
        return " or ".join(sorted(told))


def outcomes_of(rows: pd.DataFrame) -> Outcomes:
    """Return rows of the margins as outcomes."""
    margin = rows["margin"].to_numpy(dtype=np.float64)
    return Outcomes(
        pair_id=rows["pair"].to_numpy(),
        user_id=rows["person"].to_numpy(dtype=object),
        margin=margin,
        correct=correctness(margin),
    )


def entries(jobs: Iterable[tuple[JobRecord, pd.DataFrame]]) -> dict[str, list[Entry]]:
    """Group finished jobs by rows and method; methods that lack a seed others have are left out of it."""
    found: dict[str, dict[str, list[tuple[JobRecord, pd.DataFrame]]]] = {}
    for record, margins in jobs:
        found.setdefault(record.rows, {}).setdefault(record.method, []).append((record, margins))
    return {
        rows: [_entry(method, done) for method, done in methods.items()]
        for rows, methods in found.items()
    }


def _entry(method: str, done: Sequence[tuple[JobRecord, pd.DataFrame]]) -> Entry:
    frames = []
    for record, margins in done:
        world = "" if record.world is None else f"{record.world}:"
        frames.append(margins.assign(seed=record.seed, person=world + margins["user_id"]))
    whole = pd.concat(frames, ignore_index=True)
    # A pair is another one in each seed and draw. A number for each is faster to compare than text.
    whole["pair"] = pd.util.hash_pandas_object(whole[["seed", "draw", "pair_id"]], index=False)
    whole = whole.drop(columns=["pair_id", "user_id"])
    for name in ("user_kind", "who", "person"):
        whole[name] = whole[name].astype("category")
    return Entry(method, [record for record, _ in done], whole)


def common_seeds(found: Sequence[Entry]) -> list[int]:
    """Return the seeds that every method has."""
    seeds = [{record.seed for record in entry.records} for entry in found]
    return sorted(set.intersection(*seeds)) if seeds else []


def restricted(found: Sequence[Entry], seeds: Sequence[int]) -> list[Entry]:
    """Return the entries with these seeds alone."""
    return [
        Entry(
            one.method,
            [record for record in one.records if record.seed in seeds],
            one.margins[one.margins["seed"].isin(seeds)],
        )
        for one in found
    ]


def rank_intervals(outcomes: Mapping[str, Outcomes]) -> dict[str, Estimate]:
    """Return each method's rank by micro accuracy, with its interval over users drawn alike for all.

    Raises:
        ValueError: the methods do not hold the same users.
    """
    sums = {name: user_sums(one) for name, one in outcomes.items()}
    n_users = {one.n_users for one in sums.values()}
    if len(n_users) != 1:
        raise ValueError(f"methods have other numbers of users: {sorted(n_users)}")

    def rank_of(name: str) -> Any:
        def rank(weights: Array) -> Array:
            own = accuracy_micro(sums[name], weights)
            others = (accuracy_micro(one, weights) for one in sums.values())
            return np.asarray(1.0 + sum((other > own).astype(float) for other in others))

        return rank

    return bootstrap(
        {name: rank_of(name) for name in sums}, n_users=n_users.pop(), n_resamples=N_RESAMPLES
    )


def stability(found: Sequence[Entry], kind: str, shots: int | None = None) -> float | None:
    """Return the mean of Kendall's tau between seeds of the methods' accuracies; None for one seed."""
    seeds = common_seeds(found)
    table = [
        [_mean(entry.outcomes(kind, seed=seed, shots=shots)) for entry in found] for seed in seeds
    ]
    taus = [
        kendalltau(one, other).statistic
        for place, one in enumerate(table)
        for other in table[place + 1 :]
    ]
    finite = [tau for tau in taus if np.isfinite(tau)]
    return float(np.mean(finite)) if finite else None


def _mean(outcomes: Outcomes) -> float:
    return float(outcomes.correct.mean()) if len(outcomes) > 0 else np.nan


@dataclass(frozen=True)
class Line:
    """A method's line of the leaderboard, over all seeds."""

    entry: Entry
    measures: dict[str, Estimate]
    over_vanilla: Estimate
    p_value: float | None
    rank: Estimate
    wrong: Estimate | None
    generic: Estimate | None
    over_generic: Estimate | None
    agreed: Estimate | None
    gain: Estimate | None


NONE: Estimate = {"value": None, "ci95": None}


def lines(found: Sequence[Entry]) -> list[Line]:
    """Compute the leaderboard of seen users, the best method first; p-values are Holm's over the table."""
    own = {entry.method: entry.outcomes("seen") for entry in found}
    ranks = rank_intervals(own)
    vanilla = own.get(VANILLA)
    tests = {
        name: paired_test(one, vanilla, n_resamples=4 * N_RESAMPLES)
        for name, one in own.items()
        if vanilla is not None and name != VANILLA
    }
    adjusted = dict(zip(tests, holm([one["p_value"] for one in tests.values()]), strict=True))
    made = [
        Line(
            entry=entry,
            measures=summarise_outcomes(own[entry.method], n_resamples=N_RESAMPLES),
            over_vanilla=tests[entry.method]["accuracy_micro"] if entry.method in tests else NONE,
            p_value=adjusted.get(entry.method),
            rank=ranks[entry.method],
            wrong=_accuracy(entry.outcomes("seen", "wrong")),
            generic=_accuracy(entry.outcomes("seen", "generic")),
            over_generic=_generic_price(entry, vanilla),
            agreed=_accuracy(outcomes_of(_agreed(entry))),
            gain=_gain(entry, vanilla),
        )
        for entry in found
    ]
    return sorted(made, key=lambda line: line.rank["value"] or 0.0)


def _agreed(entry: Entry) -> pd.DataFrame:
    rows = entry.margins
    return rows[(rows["user_kind"] == "seen") & (rows["who"] == "own") & rows["agreed"]]


def _accuracy(outcomes: Outcomes) -> Estimate | None:
    if len(outcomes) == 0:
        return None
    return summarise_outcomes(outcomes, names=["accuracy_micro"], n_resamples=N_RESAMPLES)[
        "accuracy_micro"
    ]


def _generic_price(entry: Entry, vanilla: Outcomes | None) -> Estimate | None:
    """Return how much better the generic user is answered than by vanilla: below 0 it is a price."""
    generic = entry.outcomes("seen", "generic")
    if vanilla is None or entry.method == VANILLA or len(generic) == 0:
        return None
    return paired_difference(generic, vanilla, names=["accuracy_micro"], n_resamples=N_RESAMPLES)[
        "accuracy_micro"
    ]


def _gain(entry: Entry, vanilla: Outcomes | None) -> Estimate | None:
    oracle = entry.outcomes("seen", "oracle")
    if vanilla is None or len(oracle) == 0 or entry.method == VANILLA:
        return None
    return gain_recovered(entry.outcomes("seen"), vanilla, oracle, n_resamples=N_RESAMPLES)


def curve(entry: Entry, who: str = "own") -> list[tuple[int, Estimate]]:
    """Return micro accuracy on unseen users by the number of pairs given."""
    found = []
    for shots in entry.shots():
        estimate = _accuracy(entry.outcomes("unseen", who, shots=shots))
        if estimate is not None:
            found.append((shots, estimate))
    return found


def new_users_gain(entry: Entry, vanilla: Entry | None, shots: int) -> Estimate | None:
    """Return the share of the oracle's gain over vanilla on unseen users; None without an oracle."""
    oracle = entry.outcomes("unseen", "oracle")
    own = entry.outcomes("unseen", shots=shots)
    if vanilla is None or entry.method == VANILLA or len(oracle) == 0 or len(own) == 0:
        return None
    nobody = vanilla.outcomes("unseen", shots=0)
    return gain_recovered(own, nobody, oracle, n_resamples=N_RESAMPLES)


def warnings(found: Sequence[Entry]) -> list[str]:
    """Name what makes a table doubtful: a leak by format, or a method that one call could not train."""
    said = []
    own = {entry.method: entry.outcomes("seen") for entry in found}
    if SHAPE in own and LENGTH in own:
        gap = paired_difference(
            own[SHAPE], own[LENGTH], names=["accuracy_micro"], n_resamples=N_RESAMPLES
        )["accuracy_micro"]
        low = gap["ci95"][0] if gap["ci95"] is not None else None
        if low is not None and low > 0 and (gap["value"] or 0.0) > LEAK:
            said.append(
                f"A leak by format, or a taste for it that all share: texts replaced by their shape are "
                f"right {100 * (gap['value'] or 0.0):.1f} points more often than by their length alone."
            )
    return said


def csv_rows(rows: str, found: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return referee.csv of some rows: one line a method, seed, kind of user, shots and measure."""
    made = []
    # Methods stand innermost, as the draws of users are kept for the next one.
    for seed in [*common_seeds(found), None]:
        for kind in ("seen", "unseen"):
            for entry in found:
                for shots in [None] if kind == "seen" else entry.shots():
                    outcomes = entry.outcomes(kind, shots=shots, seed=seed)
                    if len(outcomes) == 0:
                        continue
                    cell = summarise_outcomes(outcomes, n_resamples=N_RESAMPLES)
                    for measure in STATISTICS:
                        low, high = cell[measure]["ci95"] or (None, None)
                        made.append(
                            {
                                "rows": rows,
                                "method": entry.method,
                                "halvings": entry.halvings,
                                "seed": "all" if seed is None else seed,
                                "users": kind,
                                "shots": shots,
                                "measure": measure,
                                "value": cell[measure]["value"],
                                "low": low,
                                "high": high,
                            }
                        )
    return made
