"""The embedded world: synthetic pairs in readable English, by users with known preferences.

Each prompt asks for a note on a topic, and its two responses differ in the style of `ATTRIBUTES`. Who
the users are and how they choose is in `simulated`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from plrhf.core.checks import check_arguments
from plrhf.data.sources.persona_texts import (
    ATTRIBUTES,
    DRAWS,
    LONG,
    POLES,
    PROMPTS,
    TOPICS,
    measure,
    write,
)
from plrhf.data.sources.simulated import TOPIC_STREAM, SimulatedSource, choose, divide

POPULATION_MEAN = (0.0, 0.28, 0.11, -0.26)
"""Mean of the preference vectors, in units of `scale`. Users deviate from it by about 1."""


@dataclass(frozen=True)
class _Prompt:
    """A prompt about a topic (thing, place)."""

    prompt_id: str
    text: str
    topic: tuple[str, str]


@check_arguments("data")
class PersonasSource(SimulatedSource):
    """Generates the pairs of the embedded world. The same arguments always give the same pairs.

    Args:
        n_prompts: number of distinct topics, divided 7 : 1 : 2 into train, val and test.
        people: see `SimulatedSource`.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "personas"
    poles = POLES
    population_mean = POPULATION_MEAN

    def __init__(
        self, *, n_prompts: Annotated[int, Field(ge=3, le=len(TOPICS))] = 300, **people: Any
    ) -> None:
        super().__init__(**people)
        self._prompts = self._draw_prompts(n_prompts)

    def style(self, text: str) -> np.ndarray:
        return np.array(measure(text))

    def _draw_prompts(self, n_prompts: int) -> tuple[list[_Prompt], ...]:
        """Draw distinct topics and divide them into the prompts of train, val and test."""
        rng = self.rng(TOPIC_STREAM)
        prompts = []
        for index in rng.permutation(len(TOPICS))[:n_prompts]:
            thing, place = TOPICS[index]
            text = PROMPTS[rng.integers(len(PROMPTS))].format(thing, place)
            prompts.append(_Prompt(f"{thing}-{place.lower()}", text, (thing, place)))
        return divide(prompts)

    def draw_pairs(
        self, rng: np.random.Generator, user_id: str, split: int, n: int
    ) -> Iterator[tuple[dict[str, Any], float]]:
        prompts = self._prompts[split]
        prompt_index = rng.integers(len(prompts), size=n)
        styles = _draw_styles(rng, n)  # [n, 2, A]
        margins = (styles[:, 0] - styles[:, 1]) @ np.array(self.true_vector(user_id))  # [n]
        first_wins = choose(rng, margins)
        draws = rng.random((n, 2, LONG, DRAWS)).tolist()
        for i in range(n):
            prompt = prompts[prompt_index[i]]
            winner = 0 if first_wins[i] else 1
            chosen, rejected = (
                write(topic=prompt.topic, style=styles[i, side].tolist(), draws=draws[i][side])
                for side in (winner, 1 - winner)
            )
            row = self.row(
                (user_id, split, i),
                prompt=prompt.text,
                prompt_id=prompt.prompt_id,
                chosen=chosen,
                rejected=rejected,
            )
            yield row, float(margins[i]) * (1 - 2 * winner)


def _draw_styles(rng: np.random.Generator, n: int) -> np.ndarray:
    """Draw n pairs of styles [n, 2, A] of -1 and +1, uniformly among pairs of different styles."""
    n_styles = 2 ** len(ATTRIBUTES)
    first = rng.integers(n_styles, size=n)
    second = first ^ rng.integers(1, n_styles, size=n)
    bits = np.stack([first, second], axis=1)[..., None] >> np.arange(len(ATTRIBUTES)) & 1
    return 2 * bits - 1
