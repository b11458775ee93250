"""The world of styles: texts of a language model, and users with known preferences on their style.

The texts come from a file that ``python -m plrhf.cli.make_styles`` writes: answers to each prompt in
several styles. A pair is two texts for one prompt. Style is measured on the text alone, so the same
preferences can judge whatever a policy generates. `simulated` defines the users and how they choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plrhf.core.checks import check_arguments
from plrhf.core.errors import bad_value
from plrhf.data.digests import content_hash
from plrhf.data.sources.simulated import TOPIC_STREAM, SimulatedSource, choose, divide
from plrhf.data.style_attributes import ATTRIBUTES, POLES, measure
from plrhf.data.style_texts import StyleText, read_texts

FARTHEST = 3.0
"""Largest deviation of a style from the mean, in standard deviations; larger ones are clipped."""

_POPULATION_MEAN = {"length": 0.2, "hedging": -0.25, "variety": 0.25}


@dataclass(frozen=True)
class _Answers:
    """A prompt and its texts, with their styles [K, A]."""

    prompt_id: str
    prompt: str
    texts: tuple[str, ...]
    styles: np.ndarray


@check_arguments("data")
class StylesSource(SimulatedSource):
    """Generates the pairs of the world of styles. The same file and arguments give the same pairs.

    Prompts are divided by topic, 7 : 1 : 2 into train, val and test, so that test asks about new things.

    Args:
        path: file of texts. chat: prompts are a chat's user turns, which the backbone's chat template
            writes; else plain text.
        system: system turn in front of them; None: the template's own, if it has one.
        people: see `SimulatedSource`.

    Raises:
        ValueError: an argument is out of range, no such file, or a file with too few texts.
    """

    name = "styles"
    poles = POLES
    population_mean = tuple(_POPULATION_MEAN.get(name, 0.0) for name in ATTRIBUTES)

    def __init__(
        self, *, path: str, chat: bool = True, system: str | None = None, **people: Any
    ) -> None:
        super().__init__(**people)
        self.chat, self.system = chat, system
        texts = [text for text in read_texts(Path(path)) if text.dropped is None]
        measured = np.array([measure(text.response) for text in texts]).reshape(-1, len(ATTRIBUTES))
        self._mean, self._spread = np.zeros(len(ATTRIBUTES)), np.ones(len(ATTRIBUTES))
        if len(texts) > 0:
            self._mean, spread = measured.mean(axis=0), measured.std(axis=0)
            self._spread = np.where(spread > 0, spread, 1.0)
        self._splits = self._divide(path, [*zip(texts, self._standardised(measured), strict=True)])

    def world(self) -> str:
        return content_hash(super().world(), self._mean.tolist(), self._spread.tolist())

    def style(self, text: str) -> np.ndarray:
        """Measure a(y) [A]: in standard deviations of the world's texts, at most `FARTHEST` from 0."""
        return self._standardised(np.array(measure(text)))

    def _standardised(self, measured: np.ndarray) -> np.ndarray:
        """Standardise what was measured on texts, [..., A]."""
        standard: np.ndarray = (measured - self._mean) / self._spread
        return standard.clip(-FARTHEST, FARTHEST)

    def draw_pairs(
        self, rng: np.random.Generator, user_id: str, split: int, n: int
    ) -> Iterator[tuple[dict[str, Any], float]]:
        answers = self._splits[split]
        drawn = [answers[place] for place in rng.integers(len(answers), size=n)]
        sides = [rng.choice(len(one.texts), size=2, replace=False) for one in drawn]
        difference = np.array(
            [
                one.styles[first] - one.styles[second]
                for one, (first, second) in zip(drawn, sides, strict=True)
            ]
        ).reshape(n, len(ATTRIBUTES))
        margins = difference @ np.array(self.true_vector(user_id))
        for number, first_wins in enumerate(choose(rng, margins)):
            one = drawn[number]
            winner, loser = sides[number] if first_wins else sides[number][::-1]
            row = self.row(
                (user_id, split, number),
                prompt=one.prompt,
                prompt_id=one.prompt_id,
                chosen=one.texts[winner],
                rejected=one.texts[loser],
            )
            if self.chat:
                turns = [("system", self.system), ("user", one.prompt)]
                row["prompt"] = [
                    {"role": role, "content": text} for role, text in turns if text is not None
                ]
            yield row, float(margins[number]) * (1 if first_wins else -1)

    def _divide(
        self, path: str, texts: Sequence[tuple[StyleText, np.ndarray]]
    ) -> tuple[list[_Answers], ...]:
        """Divide the prompts that have two texts or more by topic into those of train, val and test."""
        by_prompt: dict[str, list[tuple[StyleText, np.ndarray]]] = {}
        for text, style in sorted(texts, key=lambda one: (one[0].prompt_id, one[0].style)):
            by_prompt.setdefault(text.prompt_id, []).append((text, style))
        usable = [given for given in by_prompt.values() if len(given) > 1]
        topics = sorted({given[0][0].topic for given in usable})
        if len(topics) < 3:
            raise bad_value(
                "data.path",
                path,
                f"a file with two texts or more for prompts of 3 topics (has {len(topics)})",
                "Make more: python -m plrhf.cli.make_styles backbone.path=DIR out=FILE",
            )
        order = [topics[place] for place in self.rng(TOPIC_STREAM).permutation(len(topics))]
        return tuple(
            [_answers(given) for given in usable if given[0][0].topic in part]
            for part in divide(order)
        )


def _answers(given: Sequence[tuple[StyleText, np.ndarray]]) -> _Answers:
    """Put a prompt's texts and their styles together."""
    texts, styles = zip(*given, strict=True)
    responses = tuple(text.response for text in texts)
    return _Answers(texts[0].prompt_id, texts[0].prompt, responses, np.stack(styles))
