"""The first screen of a page: a picture, and three sentences made from the numbers.

They say whether a model personalises, for whom, how sure that is, and against which controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from plrhf.core.bootstrap import Estimate
from plrhf.core.stats import paired_difference
from plrhf.evaluation.metrics import USER_KINDS
from plrhf.reporting.comparison import estimate_in, p_cell
from plrhf.reporting.figures import comparison_bars, seen_against_unseen
from plrhf.reporting.over_seeds import same_tests, seeds_of
from plrhf.reporting.page import Lead
from plrhf.reporting.runs import PERSONAL, SHUFFLED, Run
from plrhf.reporting.tables import headline_rows, percent, points

Rows = Mapping[str, pd.Series]
"""Rows of a comparison by the name of their run."""

MOST_BARS = 10  # runs in the picture
CONTROLS = {
    "vanilla": "This run knows nothing of users: it is what personal runs are compared with",
    "uniform": "This run has one vector for all users: a control, in which nothing is personal",
    SHUFFLED: "This run had its user ids shuffled: a control, in which nothing personal can be gained",
}
"""What a run that is no personal one is for, by role."""


def run_lead(run: Run) -> Lead:
    """Return the first screen of a run's report."""
    clauses = []
    for kind in USER_KINDS:
        personal, generic = run.outcomes(kind), run.outcomes(kind, "generic")
        if len(personal) > 0 and len(generic) > 0:
            gain = paired_difference(personal, generic)["accuracy_micro"]
            clauses.append(_gain(gain, personal.sums.n_users, kind))
    knowing = "No test pair is there in two contexts"
    if len(clauses) > 0:
        knowing = f"Knowing who chose {', and '.join(clauses)}"
    accuracies = [
        f"{name} {_percent(cell['accuracy_micro'])}"
        for name, cell in headline_rows(run.results, "seen")
        if cell["accuracy_micro"]["value"] is not None
    ]
    sentences = [
        f"{CONTROLS.get(run.role, knowing)}.",
        f"Accuracy of seen users: {', '.join(accuracies)}.",
        f"Brackets are 95% intervals over users, of {seeds_of(run)}; plrhf compare adds the controls "
        "that are runs of their own: encoder=none, encoder=uniform, data.shuffle_users=true.",
    ]
    return Lead(sentences, seen_against_unseen(run.results))


def comparison_lead(runs: Sequence[Run], frame: pd.DataFrame) -> Lead:
    """Return the first screen of a comparison.

    Args:
        runs: the compared runs; those that differ in seed alone are pooled.
        frame: their rows, as `comparison_frame` or `seeds_frame` returns them.
    """
    sets = same_tests(runs)
    rows = {str(row["run"]): row for _, row in frame[::-1].iterrows()}
    bests = [best for best in (_best(one, rows) for one in sets) if best is not None]
    if len(bests) == 0:
        sentences = [
            "No personal run has a run without users beside it, so no gain can be told.",
            "Add one with encoder=none, of the same model, rows and seed.",
        ]
    elif len(sets) == 1:
        sentences = [_verdict(bests[0], runs, rows), _controls(sets[0], rows)]
    else:
        sentences = [
            f"On {len(sets)} sets of test pairs, {_gaining(runs, rows, PERSONAL, 'seen')} personal "
            f"runs gain for seen users, and {_gaining(runs, rows, PERSONAL, 'unseen')} for unseen users.",
            f"Of the controls, {_gaining(runs, rows, 'uniform', 'seen')} with one vector for all and "
            f"{_gaining(runs, rows, SHUFFLED, 'seen')} with shuffled users gain for seen users.",
        ]
    n_tests = sum(frame[f"{kind}_p_value"].notna().sum() for kind in USER_KINDS)
    seeds = {seeds_of(run) for run in runs}
    of_seeds = seeds.pop() if len(seeds) == 1 else "several seeds"
    sentences.append(
        f"Brackets are 95% intervals over users, of {of_seeds}; p is adjusted for {n_tests} "
        f"difference{'' if n_tests == 1 else 's'} (Holm)."
    )
    return Lead(sentences, comparison_bars(_shown(frame, bests), wide=False))


def _best(runs: Sequence[Run], rows: Rows) -> Run | None:
    """Return the best personal run with a baseline: best on val, for test would favour luck."""

    def on_val(run: Run) -> float:
        return -1.0 if run.val_accuracy is None else run.val_accuracy

    return max(_paired(runs, rows, PERSONAL), key=on_val, default=None)


def _paired(runs: Sequence[Run], rows: Rows, role: str) -> list[Run]:
    """Return the runs of a role that have a baseline."""
    return [run for run in runs if run.role == role and pd.notna(rows[run.name]["baseline"])]


def _verdict(best: Run, runs: Sequence[Run], rows: Rows) -> str:
    """Say what the best run gains over its baseline, for whom, and with which p."""
    row = rows[best.name]
    clauses = []
    for kind in USER_KINDS:
        gain = estimate_in(row, f"{kind}_difference_micro")
        if gain["value"] is not None:
            p_value = p_cell(row[f"{kind}_p_holm"]).value
            sure = "" if p_value == "–" else f", p {'' if p_value[0] == '<' else '= '}{p_value}"
            clauses.append(_gain(gain, int(row[f"{kind}_n_users"]), kind) + sure)
    n_personal = len(_paired(runs, rows, PERSONAL))
    chosen = f", on val the best of {n_personal} personal runs," if n_personal > 1 else ""
    return f"Over {row['baseline']}, {best.name}{chosen} {'; it '.join(clauses)}."


def _controls(runs: Sequence[Run], rows: Rows) -> str:
    """Say what the controls of one set of test pairs reach for seen users, and which are not there."""
    said = []
    for run in runs:
        gain = estimate_in(rows[run.name], "seen_difference_micro")
        if run.role in CONTROLS and gain["value"] is not None:
            said.append(f"{run.name} ({run.role}) {_points(gain)}")
    for role, name in (("length", "length alone"), ("oracle", "the oracle")):
        for row in rows.values():
            accuracy = estimate_in(row, "seen_accuracy_micro")
            if row["role"] == role and accuracy["value"] is not None:
                said.append(f"{name} {_percent(accuracy)}")
    there = {run.role for run in runs}
    needed = {"uniform": "encoder=uniform", SHUFFLED: "data.shuffle_users=true"}
    missing = [setting for role, setting in needed.items() if role not in there]
    more = f"; no run here has {' or '.join(missing)}" if len(missing) > 0 else ""
    return f"Beside it, seen users: {', '.join(said)}{more}."


def _gaining(runs: Sequence[Run], rows: Rows, role: str, kind: str) -> str:
    """Say how many runs of a role with a baseline gain over it for a kind of user."""
    names = [run.name for run in _paired(runs, rows, role)]
    gains = [estimate_in(rows[name], f"{kind}_difference_micro") for name in names]
    return f"{sum(map(_is_gain, gains))} of {len(gains)}"


def _points(gain: Estimate) -> str:
    """Write a difference in points, with its interval."""
    cell = points(gain)
    return f"{cell.value} points {cell.interval}".rstrip()


def _percent(share: Estimate) -> str:
    """Write an accuracy in per cent, with its interval."""
    cell = percent(share)
    return f"{cell.value}% {cell.interval}".rstrip()


def _is_gain(gain: Estimate) -> bool:
    """Whether the whole interval of a difference is above 0."""
    return gain["ci95"] is not None and gain["ci95"][0] > 0


def _gain(gain: Estimate, n_users: int, kind: str) -> str:
    """Say what a difference in accuracy means for so many users of a kind."""
    users = f"{n_users:,} {kind} user{'' if n_users == 1 else 's'}"
    if gain["ci95"] is None:
        return f"changes {_points(gain)} for {users}, too few for an interval"
    if _is_gain(gain):
        return f"gains {_points(gain)} for {users}"
    if gain["ci95"][1] < 0:
        return f"loses {_points(gain)} for {users}"
    return f"shows no gain for {users}, {_points(gain)}"


def _shown(frame: pd.DataFrame, bests: Sequence[Run]) -> pd.DataFrame:
    """Return the rows that the picture has room for: the best runs, their baselines, the controls."""
    if len(frame) <= MOST_BARS:
        return frame
    names = [run.name for run in bests]
    baselines = frame["baseline"][frame["run"].isin(names)]
    rank = frame["role"].map({SHUFFLED: 2, "uniform": 3, "oracle": 4, "length": 5}).fillna(6)
    rank[frame["run"].isin(baselines)] = 1
    rank[frame["run"].isin(names)] = 0
    return frame.loc[rank.sort_values(kind="stable").index[:MOST_BARS]].reset_index(drop=True)
