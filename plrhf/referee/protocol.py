"""What a method goes through on some rows: trials tuned on val, then one look at test, with controls.

Of a method's trials the one with the best val score of seen users is taken, and only that one is asked
test pairs. Nothing here looks at a test pair before that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd
import torch

from plrhf.core.monitor import higher_is_better
from plrhf.core.types import GENERIC_USER
from plrhf.data.dataset import PairDataset
from plrhf.data.module import PreferenceData
from plrhf.models.adaptation import Adaptation
from plrhf.models.adaptation.fitting import user_tables
from plrhf.models.reward import PersonalRewardModel
from plrhf.referee.facts import Facts
from plrhf.referee.new_users import FewShots, new_user_margins, unfitted_margins
from plrhf.referee.side_by_side import Trained, Training, train_groups

T = TypeVar("T")

MARGINS = ("user_kind", "who", "shots", "draw", "pair_id", "user_id", "margin")
"""Columns of the margins on test pairs, beside ``agreed``, whether nearly all agree on the pair.

`who` is whom the model takes the user for: ``own`` (who they are), ``wrong`` (another person), ``generic``
(nobody known), or ``oracle``. `shots` is the number of pairs given of an unseen user, -1 for seen users.
"""


@dataclass(frozen=True)
class Tuned(Generic[T]):
    """The trials of a method and what each came to, the model of the best, and CPU seconds taken."""

    trials: list[T]
    results: list[Trained]
    best: int
    model: PersonalRewardModel
    seconds: float
    vmapped: bool


@dataclass(frozen=True)
class JobResult(Generic[T]):
    """What a method did on some rows: its trials, margins on test pairs, and fields of `JobRecord`."""

    tuned: Tuned[T]
    margins: pd.DataFrame
    record: dict[str, Any]


def referee_job(
    groups: Sequence[Sequence[T]],
    data: PreferenceData,
    training: Training,
    build: Callable[[T], PersonalRewardModel],
    shots: FewShots | None,
    facts: Facts,
    *,
    rule: Adaptation | None,
    seed: int,
) -> JobResult[T]:
    """Tune a method on val, and ask the best trial the test pairs.

    Args:
        shots: pairs of unseen users, None where there are too few. facts: of the rows.
        rule: how unseen users are inferred; None: they stay as they are before a pair is given, as where
            the encoder knows nothing of single users.
        others: see `tune`.
    """
    tuned = tune(groups, data, training, build)
    margins = [seen_margins(tuned.model, data, seed=seed)]
    seconds = 0.0
    if shots is not None:
        margins[0] = margins[0][margins[0]["user_kind"] == "seen"]
        of_new, seconds = unseen_margins(tuned.model, data, shots, rule)
        margins.append(of_new)
    whole = pd.concat(margins, ignore_index=True)
    whole["agreed"] = whole["pair_id"].isin(facts.agreed)
    record = {
        "personal": tuned.model.encoder.personal,
        "best": tuned.best,
        "vmapped": tuned.vmapped,
        "seconds": tuned.seconds,
        "seconds_per_user": seconds,
        "numbers_per_user": numbers_per_user(tuned.model),
        "facts": facts.span,
    }
    return JobResult(tuned, whole, record)


def unseen_margins(
    model: PersonalRewardModel, data: PreferenceData, shots: FewShots, rule: Adaptation | None
) -> tuple[pd.DataFrame, float]:
    """Return margins on the pairs asked of unseen users, and the seconds that a fit takes a user.

    Args:
        others: see `referee_job`.
    """
    size, encoder, seconds = data.eval_batch_size, model.encoder, 0.0
    if rule is not None and (encoder.reads_context or len(user_tables(encoder)) > 0):
        found, seconds = new_user_margins(model, shots, rule, batch_size=size)
    else:
        own, generic = margins_on(model, shots.dataset, batch_size=size).T
        found = unfitted_margins(shots, {"own": own, "generic": generic})
    true = true_margins(data, shots.dataset)
    if true is not None:
        found = pd.concat([found, unfitted_margins(shots, {"oracle": true})], ignore_index=True)
    return found, seconds


def tune(
    groups: Sequence[Sequence[T]],
    data: PreferenceData,
    training: Training,
    build: Callable[[T], PersonalRewardModel],
) -> Tuned[T]:
    """Train all trials and choose the one with the best val score.

    Args:
        groups: trials of equal structure together. build: makes a trial's model, from its seed.
        data: train and val pairs alone are read.
    """
    started = time.process_time()
    seen = data.restrict_to("train", "val")
    trials: list[T] = []
    results: list[Trained] = []
    best: tuple[float, int, PersonalRewardModel] | None = None
    vmapped = True
    built, states = [], []
    for group in groups:
        built.append([build(trial) for trial in group])
        states.append(torch.get_rng_state())
    found = train_groups(built, seen, training, states)
    for group, models, of_group in zip(groups, built, found, strict=True):
        vmapped = vmapped and all(result.vmapped for result in of_group)
        for trial, result, model in zip(group, of_group, models, strict=True):
            score = -result.score if higher_is_better(training.monitor) else result.score
            if best is None or score < best[0]:
                best = (score, len(trials), model)
            trials.append(trial)
            results.append(result)
    assert best is not None
    seconds = time.process_time() - started
    return Tuned(trials, results, best[1], best[2], seconds, vmapped)


def numbers_per_user(model: PersonalRewardModel) -> int:
    """Return how many learned numbers belong to one user alone."""
    tables = user_tables(model.encoder)
    return sum(table[0].numel() for table in tables.values())


@torch.no_grad()
def margins_on(model: PersonalRewardModel, dataset: PairDataset, *, batch_size: int) -> np.ndarray:
    """Return the margins of all pairs of a dataset, for its users and for the generic one, [N, 2]."""
    model.eval()
    found = [np.empty((0, 2))]
    for start in range(0, len(dataset), batch_size):
        batch = dataset.batch(range(start, min(start + batch_size, len(dataset))))
        margins = model.context_margins(batch)
        both = torch.stack([margins["user"], margins["generic"]], dim=1)
        found.append(both.double().numpy())
    return np.concatenate(found)


def true_margins(data: PreferenceData, dataset: PairDataset) -> np.ndarray | None:
    """Return the margins of pairs by the users' true preferences, [N]; None unless they are simulated."""
    true = data.source.oracle_margins()
    return None if true is None else np.array([true[row.pair_id] for row in dataset.rows])


def as_other_users(test: PairDataset, train: PairDataset, *, seed: int) -> PairDataset:
    """Return a copy of the test pairs in which seen users are taken for another train user each.

    Pairs of unseen users stay as they are.
    """
    n_users = int(train.user_id.max())
    changed = copy(test)
    order = np.random.default_rng(seed).permutation(n_users)  # a cycle, in which nobody is himself
    other = np.zeros(n_users + 1, dtype=np.int64)
    other[order + 1] = np.roll(order, 1) + 1
    changed.user_id = torch.from_numpy(other)[test.user_id]
    features = torch.full((n_users + 1, train.features.shape[1]), torch.nan)
    features[train.user_id] = train.features
    seen = test.user_id != GENERIC_USER
    changed.features = torch.where(seen[:, None], features[changed.user_id], test.features)
    if test.context is not None:  # whose pairs an encoder reads goes by the user, too
        changed.context = copy(test.context)
        changed.context.asked = changed
    return changed


def seen_margins(
    model: PersonalRewardModel, data: PreferenceData, *, seed: int, batch_size: int = 8192
) -> pd.DataFrame:
    """Return margins on test pairs: of users as they are, taken for another, and as the generic one.

    Unseen users are met with no pair given, `shots` 0.
    """
    test, train = data.datasets["test"], data.datasets["train"]
    own = margins_on(model, test, batch_size=batch_size)
    found = {"own": own[:, 0], "generic": own[:, 1]}
    if model.encoder.personal and data.n_users > 1:
        others = as_other_users(test, train, seed=seed)
        found["wrong"] = margins_on(model, others, batch_size=batch_size)[:, 0]
    true = true_margins(data, test)
    pairs = [(row.pair_id, row.user_id) for row in test.rows]
    if true is not None:
        found["oracle"] = true
    seen_users = set(data.splits.users)
    kinds = ["seen" if user in seen_users else "unseen" for _, user in pairs]
    frames = [
        pd.DataFrame(
            {
                "user_kind": kinds,
                "who": who,
                "shots": np.where(np.array(kinds) == "seen", -1, 0),
                "draw": 0,
                "pair_id": [pair_id for pair_id, _ in pairs],
                "user_id": [user for _, user in pairs],
                "margin": margins,
            }
        )
        for who, margins in found.items()
    ]
    whole = pd.concat(frames, ignore_index=True)[list(MARGINS)]
    return whole[(whole["who"] != "wrong") | (whole["user_kind"] == "seen")]
