"""Best-of-n: of several sampled texts, the one that a reward model likes best for its user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

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


def best_texts(
    reward: PersonalRewardModel, rows: Sequence[Row], candidates: Sequence[Sequence[str]]
) -> list[str]:
    """Return for each row that of its candidate responses with the highest reward for its user.

    A blank text is never chosen, unless all are blank.
    """
    places = [
        (number, text)
        for number, texts in enumerate(candidates)
        for text in dict.fromkeys(texts)
        if text.strip()
    ]
    of_rows = requests(rows, [True] * len(rows), ("user",))
    asked = [{**of_rows[number], "response": text} for number, text in places]
    best = [float("-inf")] * len(rows)
    chosen = [""] * len(rows)
    for (number, text), value in zip(places, reward.score(asked).tolist(), strict=True):
        if value > best[number]:
            best[number], chosen[number] = value, text
    return chosen
