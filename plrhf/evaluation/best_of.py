"""Best-of-n: of several sampled texts, the one that a reward model likes best for its user."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from plrhf.core.checks import PositiveFloat, check_arguments
from plrhf.core.errors import bad_value
from plrhf.data.rows import Row
from plrhf.models.reward import PersonalRewardModel, load_reward
from plrhf.models.rollouts import requests

Writer = Literal["policy", "reference"]


@check_arguments("eval.best_of")
@dataclass(frozen=True, kw_only=True)
class BestOf:
    """Settings of best-of-n.

    Args:
        n: number of texts that are sampled for each prompt. A policy samples them for each user; the
            reference once for all users.
        reward: a reward model of the same users: its run or export.
        writers: who samples.
        temperature: of sampling.
    """

    n: Annotated[int, Field(ge=2)]
    reward: str
    writers: list[Writer]
    temperature: PositiveFloat

    def __post_init__(self) -> None:
        if len(self.writers) == 0:
            cure = "Set eval.best_of.writers=[reference]"
            raise bad_value("eval.best_of.writers", [], "reference, policy or both", cure)

    def load_reward(self, users: Sequence[str]) -> PersonalRewardModel:
        """Load the reward model.

        Raises:
            ValueError: it is no reward model, or was not trained on one of the users.
        """
        model = load_reward(self.reward, "eval.best_of.reward")
        for user in users:
            model.card.user_index(user, "eval.best_of.reward")
        return model


def candidate_rewards(
    reward: PersonalRewardModel, rows: Sequence[Row], candidates: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Compute the rewards of each row's candidate responses for its user; of blank texts it is -inf."""
    places = [
        (number, text)
        for number, texts in enumerate(candidates)
        for text in dict.fromkeys(texts)
        if text.strip()
    ]
    of_rows = requests(rows, [True] * len(rows), ("user",))
    asked = [{**of_rows[number], "response": text} for number, text in places]
    found = dict(zip(places, reward.score(asked).tolist(), strict=True))
    return [
        [found.get((number, text), -math.inf) for text in texts]
        for number, texts in enumerate(candidates)
    ]


def best_texts(
    candidates: Sequence[Sequence[str]], rewards: Sequence[Sequence[float]]
) -> list[str]:
    """Return for each row that of its candidate responses with the highest reward, of equals the first.

    A blank text is never chosen. If all are blank, the text is empty.
    """
    best = [
        max(zip(own, texts, strict=True), key=itemgetter(0))
        for own, texts in zip(rewards, candidates, strict=True)
    ]
    return [text if value > -math.inf else "" for value, text in best]


class BestOfPoint(NamedTuple):
    """What the best of n texts comes to, on average.

    Attributes:
        reward: expected reward. kl: most that it diverges from who sampled, log n - (n - 1) / n nats
            (Beirami et al. 2024, arXiv 2401.01879). score: expected true preference, or None if unknown.
    """

    n: int
    reward: float
    kl: float
    score: float | None


def best_of_curve(
    rewards: Sequence[Sequence[float]], scores: Sequence[Sequence[float | None]]
) -> list[BestOfPoint]:
    """Compute the expected best of 1, 2, 4, ... and all of N sampled texts, from the same texts.

    The text of rank i from below is the best of n drawn without replacement with probability
    C(i - 1, n - 1) / C(N, n), so the mean over all draws is exact. A blank text counts as the worst of its
    row, and rows of blank texts alone are left out.

    Args:
        rewards: of N texts for each of the rows, -inf for blank ones. scores: their true preferences.
    """
    ranked = []  # rewards and true preferences of each row's texts, the worst first
    for own, true in zip(rewards, scores, strict=True):
        spoken = [one for one in own if one > -math.inf]
        if len(spoken) > 0:
            filled = [max(one, min(spoken)) for one in own]
            ranked.append(sorted(zip(filled, true, strict=True), key=itemgetter(0)))
    if len(ranked) == 0:
        return []
    total = len(ranked[0])
    known = all(score is not None for own in ranked for _, score in own)
    points = []
    for n in sorted({2**power for power in range(total.bit_length())} | {total}):
        chances = [math.comb(rank, n - 1) / math.comb(total, n) for rank in range(total)]
        means = np.einsum("rtv,t->v", np.array(ranked, dtype=np.float64), chances) / len(ranked)
        kl = math.log(n) - (n - 1) / n
        points.append(BestOfPoint(n, float(means[0]), kl, float(means[1]) if known else None))
    return points


def describe_curve(points: Sequence[BestOfPoint]) -> str:
    """Write a curve as lines of text."""
    lines = ["  n  reward  KL at most  true preference"]
    for one in points:
        score = "" if one.score is None else f"{one.score:+.2f}"
        lines.append(f"{one.n:3d}  {one.reward:+6.2f}  {one.kl:10.2f}  {score:>15}")
    return "\n".join(lines)
