"""Computes the test results of results.json from the table of predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from plrhf.core.bootstrap import N_RESAMPLES, Array, Estimate
from plrhf.core.errors import bad_value
from plrhf.core.stats import (
    ACCURACIES,
    Outcomes,
    correctness,
    paired_difference,
    summarise_outcomes,
)

# Of nll and ece in results.json. Numbers of processes, threads and devices round float32 margins
# differently, by some 1e-6 after 50 steps; accuracies count signs alone and are exact.
DECIMALS = 4
UserKind = Literal["seen", "unseen"]
USER_KINDS: tuple[UserKind, ...] = ("seen", "unseen")
PROMPT_KINDS = ("seen", "unseen")


def outcomes(
    predictions: pd.DataFrame,
    *,
    user_kind: str,
    context: str,
    prompt_kind: str | None = None,
    split: Literal["val", "test"] = "test",
) -> Outcomes:
    """Select the pairs of one kind of user in one context; there may be none.

    Args:
        prompt_kind: only pairs on seen or unseen prompts; None: all pairs.
    """
    chosen = (
        (predictions["split"] == split)
        & (predictions["user_kind"] == user_kind)
        & (predictions["context"] == context)
    )
    if prompt_kind is not None:
        chosen &= predictions["prompt_kind"] == prompt_kind
    rows = predictions.loc[chosen, ["pair_id", "user_id", "margin", "correct"]]
    return _outcomes(rows, rows["margin"], rows["correct"])


def personal_gain(predictions: pd.DataFrame) -> Estimate | None:
    """Estimate what knowing the user gains on val pairs: accuracy less that of the generic user.

    Returns:
        The difference with its interval over users; None without val pairs of seen users.
    """
    user, generic = (
        outcomes(predictions, user_kind="seen", context=context, split="val")
        for context in ("user", "generic")
    )
    if len(user) == 0:
        return None
    return paired_difference(user, generic, names=["accuracy_micro"])["accuracy_micro"]


LONGER_WINS, SHORTER_WINS = "the longer response wins", "the shorter response wins"


def choose_length_rule(predictions: pd.DataFrame) -> bool:
    """Whether users chose the longer response more often than the shorter one in train or val pairs.

    Raises:
        ValueError: the table contains test pairs, on which nothing may be chosen.
    """
    if (predictions["split"] == "test").any():
        raise bad_value(
            "split",
            "test",
            "train or val rows only, as a rule that is chosen on test pairs looks too good",
            "Pass predictions[predictions['split'] == 'val'] to choose_length_rule",
        )
    pairs = predictions.drop_duplicates("pair_id")
    return bool(np.sign(_extra_tokens(pairs)).sum() >= 0)


def length_only(predictions: pd.DataFrame, *, user_kind: str, longer_wins: bool) -> Outcomes:
    """Predict that the longer (or the shorter) response in tokens wins each test pair.

    The margin is a difference of lengths and not of log-odds, so nll and calibration mean nothing.
    """
    rows = predictions[
        (predictions["split"] == "test") & (predictions["user_kind"] == user_kind)
    ].drop_duplicates("pair_id")
    margin = _extra_tokens(rows) if longer_wins else -_extra_tokens(rows)
    return _outcomes(rows, margin, correctness(margin))


def summarise(
    predictions: pd.DataFrame,
    *,
    longer_wins: bool,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the keys test, cells, oracle and controls of results.json.

    Args:
        predictions: the table of predictions.parquet, of which only test rows are used.
        longer_wins: direction of the length-only rule, see `choose_length_rule`.
        n_resamples: number of bootstrap resamples of users.
        seed: seed of the bootstrap.
    """

    def summary(outcomes: Outcomes, **names: Any) -> dict[str, Any]:
        return _rounded(summarise_outcomes(outcomes, n_resamples=n_resamples, seed=seed, **names))

    def cells(context: str) -> dict[str, Any]:
        return {
            kind: summary(outcomes(predictions, user_kind=kind, context=context))
            for kind in USER_KINDS
        }

    user, generic = cells("user"), cells("generic")
    lengths = {
        kind: summary(
            length_only(predictions, user_kind=kind, longer_wins=longer_wins), names=ACCURACIES
        )
        for kind in USER_KINDS
    }
    test = {kind: {"user": user[kind], "generic": generic[kind]} for kind in USER_KINDS}
    rule = LONGER_WINS if longer_wins else SHORTER_WINS
    has_oracle = (predictions["context"] == "oracle").any()
    return {
        "test": test,
        "cells": {
            f"{kind}_user_{prompts}_prompt": _cell(predictions, kind, prompts, test[kind], summary)
            for kind in USER_KINDS
            for prompts in PROMPT_KINDS
        },
        "oracle": cells("oracle") if has_oracle else None,
        "controls": {"length_only": {"rule": rule, **lengths}},
    }


def _rounded(cell: dict[str, Any]) -> dict[str, Any]:
    """Round nll and ece, which depend on the size of margins, to `DECIMALS`."""

    def of(value: float | None) -> float | None:
        return None if value is None else round(value, DECIMALS)

    for name in ("nll", "ece"):
        value, ends = cell[name]["value"], cell[name]["ci95"]
        ends = None if ends is None else [of(end) for end in ends]
        cell = {**cell, name: {"value": of(value), "ci95": ends}}
    return cell


def _cell(
    predictions: pd.DataFrame,
    user_kind: str,
    prompt_kind: str,
    whole: dict[str, Any],
    summary: Callable[[Outcomes], dict[str, Any]],
) -> dict[str, Any] | None:
    """Summarise one kind of user on one kind of prompt, in both contexts; None without pairs.

    Args:
        whole: the summary of these users on all prompts.
        summary: summarises outcomes.
    """
    cell = {}
    for context in ("user", "generic"):
        found = outcomes(predictions, user_kind=user_kind, context=context, prompt_kind=prompt_kind)
        if len(found) == 0:
            return None
        # All pairs are of this kind, as a rule: nothing to resample again.
        everything = len(found) == whole[context]["n_pairs"]
        cell[context] = whole[context] if everything else summary(found)
    return cell


def _extra_tokens(rows: pd.DataFrame) -> Array:
    """Return how many tokens longer the chosen response is than the rejected one, [N]."""
    lengths = rows[["chosen_tokens", "rejected_tokens"]].to_numpy(dtype=np.float64)
    return np.asarray(lengths[:, 0] - lengths[:, 1])


def _outcomes(rows: pd.DataFrame, margin: ArrayLike, correct: ArrayLike) -> Outcomes:
    """Make outcomes of rows of the table with these margins."""
    return Outcomes(
        pair_id=rows["pair_id"].to_numpy(),
        user_id=rows["user_id"].to_numpy(),
        margin=np.asarray(margin, dtype=np.float64),
        correct=np.asarray(correct, dtype=np.float64),
    )
