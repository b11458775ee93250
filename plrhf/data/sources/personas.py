"""The embedded world: readable English, users with known preferences, and noisy choices.

Prompts ask for a note on a topic, responses differ in style, and user u with preferences v_u over
`ATTRIBUTES` chooses by Bradley-Terry: P(y1 > y2 | u) = sigmoid(v_u . (a(y1) - a(y2))), a(y) being
the style of y. Since v_u is known, so is the best accuracy that any model can reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from plrhf.core.errors import bad_value
from plrhf.data.rows import SPLITS, content_hash
from plrhf.data.sources.base import Source
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

KINDS = ("individual", "clusters", "features")
POPULATION_MEAN = (0.0, 0.28, 0.11, -0.26)
"""What everybody shares, in units of `scale`; single users depart from it by about 1."""

REGIONS = ("coast", "hills", "plains", "city")
PROFESSIONS = ("nurse", "teacher", "farmer", "dentist", "painter")
AGES, READING_HOURS = (18, 80), (0, 14)

# One random stream for each purpose, so that more of one thing leaves the others as they were.
_TOPIC_STREAM, _WORLD_STREAM, _USER_STREAM, _PAIR_STREAM = range(4)
_NAMES = (
    *("ada", "ben", "cleo", "dan", "eva", "finn", "gina", "hugo", "iris", "jon", "kira", "leo"),
    *("mira", "noah", "olga", "paul", "rosa", "sam", "tara", "vera"),
)


@dataclass(frozen=True)
class Persona:
    """A user: preferences in the order of `ATTRIBUTES`, and what is observed of the user."""

    vector: np.ndarray  # [A] float64
    type: int | None = None
    features: Mapping[str, int | str] | None = None


@dataclass(frozen=True)
class _Prompt:
    prompt_id: str
    text: str
    topic: tuple[str, str]


class PersonasSource(Source):
    """Yield the pairs of a population of personas; everything follows from the arguments.

    Args:
        kind: `individual` (each user has a vector of their own), `clusters` (users of one type
            share a vector) or `features` (the vector is a function of `user_features`).
        n_users: users with train, val and test pairs.
        n_unseen_users: further users, with test pairs only.
        pairs_per_user, val_pairs_per_user, test_pairs_per_user: pairs of one user by split.
        n_prompts: distinct topics, 7 : 1 : 2 over train, val and test.
        n_types: user types; read by `clusters` only.
        scale: strength of preferences; the smaller, the noisier the choices.
        seed: 0 or above; draws the world, its users and their choices.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        kind: str,
        n_users: int = 100,
        n_unseen_users: int = 20,
        pairs_per_user: int = 100,
        val_pairs_per_user: int = 10,
        test_pairs_per_user: int = 20,
        n_prompts: int = 300,
        n_types: int = 4,
        scale: float = 1.8,
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise bad_value(
                "data.kind", kind, f"one of {', '.join(KINDS)}", "Set data.kind=individual"
            )
        _check_integer("n_users", n_users, low=1, cure=100)
        _check_integer("n_unseen_users", n_unseen_users, low=0, cure=20)
        _check_integer("pairs_per_user", pairs_per_user, low=1, cure=100)
        _check_integer("val_pairs_per_user", val_pairs_per_user, low=0, cure=10)
        _check_integer("test_pairs_per_user", test_pairs_per_user, low=0, cure=20)
        _check_integer("n_prompts", n_prompts, low=3, high=len(TOPICS), cure=300)
        _check_integer("n_types", n_types, low=2, cure=4)
        _check_integer("seed", seed, low=0, cure=0)
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not (is_number and math.isfinite(scale) and scale > 0):
            raise bad_value("data.scale", scale, "a number above 0", "Set data.scale=1.8")
        self.kind, self.n_users, self.scale, self.seed = kind, n_users, scale, seed
        self.n_types = n_types
        self.pairs_per_split = (pairs_per_user, val_pairs_per_user, test_pairs_per_user)
        self._prompts = self._draw_prompts(n_prompts)
        self._world = _World(kind=kind, n_types=n_types, rng=self._rng(_WORLD_STREAM))
        names = [
            f"{_NAMES[index % len(_NAMES)]}-{index:03d}"
            for index in range(n_users + n_unseen_users)
        ]
        self._personas = {name: self._draw_persona(i) for i, name in enumerate(names)}

    @property
    def user_ids(self) -> list[str]:
        """Every user, the `n_users` seen ones first."""
        return list(self._personas)

    def world(self) -> str:
        """Return a hash of what decides the people: other seeds reuse their ids."""
        return content_hash(self.kind, self.seed, self.scale, self.n_types)

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield (where, raw row) user by user, each in the order train, val, test."""
        for row, _ in self._pairs:
            yield f"personas:{row['pair_id']}", dict(row)

    def oracle_margins(self) -> dict[str, float]:
        """Return the true margin v_u . (a(chosen) - a(rejected)) of each pair id; where it is
        below 0, the user chose against their own preferences."""
        return {row["pair_id"]: margin for row, margin in self._pairs}

    def true_vector(self, user_id: str) -> list[float]:
        """Return v_u, a number for each of `ATTRIBUTES`."""
        return self._persona(user_id).vector.tolist()

    def true_type(self, user_id: str) -> int | None:
        """Return the number of the user's type, from 0; None unless users come in types."""
        return self._persona(user_id).type

    def features(self, user_id: str) -> Mapping[str, int | str] | None:
        """Return what is observed of the user; None unless preferences follow features."""
        return self._persona(user_id).features

    def true_score(self, user_id: str, text: str) -> float:
        """Return v_u . measure(text), by which generated text is judged."""
        return float(self._persona(user_id).vector @ np.array(measure(text)))

    def profile(self, user_id: str) -> str:
        """Say in words who the user is and which styles they like."""
        persona = self._persona(user_id)
        taste = _taste(persona.vector)
        if persona.type is not None:
            return f"Type {persona.type}. {taste}"
        if persona.features is not None:
            who = "A {profession} of {age} from the {region}, {reading_hours} h of reading a week. "
            return who.format(**persona.features) + taste
        return taste

    def group(self, user_id: str) -> str:
        """Name the user's type, or else their strongest preference."""
        persona = self._persona(user_id)
        if persona.type is not None:
            return f"type {persona.type}"
        strongest = int(np.abs(persona.vector).argmax())
        return f"prefers {POLES[ATTRIBUTES[strongest]][int(persona.vector[strongest] > 0)]}"

    def _persona(self, user_id: str) -> Persona:
        if user_id not in self._personas:
            first, last = self.user_ids[0], self.user_ids[-1]
            allowed = f"one of the {len(self._personas)} users {first} to {last}"
            raise bad_value("user_id", user_id, allowed, "Take an id from the rows of this world")
        return self._personas[user_id]

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])

    def _draw_persona(self, index: int) -> Persona:
        departure, type_, features = self._world.draw(self._rng(_USER_STREAM, index))
        vector = self.scale * (np.array(POPULATION_MEAN) + departure)
        return Persona(vector=vector, type=type_, features=features)

    def _draw_prompts(self, n_prompts: int) -> tuple[list[_Prompt], ...]:
        """Draw topics without replacement and part them into train, val and test."""
        rng = self._rng(_TOPIC_STREAM)
        prompts = []
        for index in rng.permutation(len(TOPICS))[:n_prompts]:
            thing, place = TOPICS[index]
            text = PROMPTS[rng.integers(len(PROMPTS))].format(thing, place)
            prompts.append(_Prompt(f"{thing}-{place.lower()}", text, (thing, place)))
        n_val, n_test = max(1, n_prompts // 10), max(1, n_prompts // 5)
        return prompts[n_val + n_test :], prompts[:n_val], prompts[n_val : n_val + n_test]

    @cached_property
    def _pairs(self) -> list[tuple[dict[str, Any], float]]:
        """Every row with its true margin."""
        return [
            pair
            for index, user_id in enumerate(self._personas)
            for split in range(len(SPLITS))
            if index < self.n_users or SPLITS[split] == "test"
            for pair in self._draw_pairs(index, user_id, split)
        ]

    def _draw_pairs(
        self, index: int, user_id: str, split: int
    ) -> Iterator[tuple[dict[str, Any], float]]:
        """Yield one user's rows of one split with their true margins."""
        persona, prompts = self._personas[user_id], self._prompts[split]
        n = self.pairs_per_split[split]
        rng = self._rng(_PAIR_STREAM, index, split)
        asked = rng.integers(len(prompts), size=n)
        styles = _draw_styles(rng, n)  # [n, 2, A]
        margins = (styles[:, 0] - styles[:, 1]) @ persona.vector  # [n]
        first_wins = rng.random(n) < 1 / (1 + np.exp(-margins))
        draws = rng.random((n, 2, LONG, DRAWS)).tolist()
        for i in range(n):
            prompt = prompts[asked[i]]
            winner = 0 if first_wins[i] else 1
            chosen, rejected = (
                write(topic=prompt.topic, style=styles[i, side].tolist(), draws=draws[i][side])
                for side in (winner, 1 - winner)
            )
            content = content_hash(prompt.text, chosen, rejected)
            row: dict[str, Any] = {
                "prompt": prompt.text,
                "chosen": chosen,
                "rejected": rejected,
                "user_id": user_id,
                "user_features": persona.features,
                "prompt_id": prompt.prompt_id,
                # The hash: two worlds' pairs have the same id only if they are the same.
                "pair_id": f"{self.kind}-{self.seed}-{user_id}-{SPLITS[split]}-{i:03d}-{content}",
                "split": SPLITS[split],
            }
            yield row, float(margins[i]) * (1 - 2 * winner)


class _World:
    """How the users of one kind depart from the population mean: vectors of length about 1."""

    def __init__(self, *, kind: str, n_types: int, rng: np.random.Generator) -> None:
        self.kind = kind
        self.types = _spread_directions(rng, n_types)
        self.age, self.reading = _spread_directions(rng, 1)[0], _spread_directions(rng, 1)[0]
        self.regions = _spread_directions(rng, len(REGIONS))
        self.professions = _spread_directions(rng, len(PROFESSIONS))
        self.ageing = _spread_directions(rng, len(PROFESSIONS))

    def draw(
        self, rng: np.random.Generator
    ) -> tuple[np.ndarray, int | None, dict[str, Any] | None]:
        """Draw a user: departure [A], type, features."""
        if self.kind == "clusters":
            type_ = int(rng.integers(len(self.types)))
            return self.types[type_], type_, None
        if self.kind == "features":
            features: dict[str, Any] = {
                "age": int(rng.integers(AGES[0], AGES[1] + 1)),
                "reading_hours": int(rng.integers(READING_HOURS[0], READING_HOURS[1] + 1)),
                "region": REGIONS[rng.integers(len(REGIONS))],
                "profession": PROFESSIONS[rng.integers(len(PROFESSIONS))],
            }
            return self.from_features(**features), None, features
        return _unit(rng.standard_normal(len(ATTRIBUTES))), None, None

    def from_features(
        self, *, age: int, reading_hours: int, region: str, profession: str
    ) -> np.ndarray:
        """Return the departure [A] of a user with these features; what age does to preferences
        depends on the profession, so the function is not quite additive."""
        older = _standard(age, AGES)
        trade = PROFESSIONS.index(profession)
        # The squared weights sum to 1, so that users of this kind are as decided as the others.
        return (
            0.55 * older * self.age
            + 0.35 * _standard(reading_hours, READING_HOURS) * self.reading
            + 0.50 * self.regions[REGIONS.index(region)]
            + 0.50 * self.professions[trade]
            + 0.27 * older * self.ageing[trade]
        )


def _standard(value: int, bounds: tuple[int, int]) -> float:
    """Put a uniform integer from low to high on mean 0, standard deviation 1."""
    low, high = bounds
    return (value - (low + high) / 2) / math.sqrt(((high - low + 1) ** 2 - 1) / 12)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _spread_directions(rng: np.random.Generator, n: int) -> np.ndarray:
    """Draw n unit vectors [n, A], around 0 and well apart where n > 1: the best of 200 drawings."""
    if n == 1:
        return _unit(rng.standard_normal((1, len(ATTRIBUTES))))
    drawings = rng.standard_normal((200, n, len(ATTRIBUTES)))
    drawings = _unit(drawings - drawings.mean(axis=1, keepdims=True))
    cosines = drawings @ drawings.transpose(0, 2, 1) - 2 * np.eye(n)  # own cosine never the largest
    return drawings[cosines.max(axis=(1, 2)).argmin()]


def _draw_styles(rng: np.random.Generator, n: int) -> np.ndarray:
    """Draw n pairs of styles [n, 2, A], independent and uniform but for never being equal."""
    n_styles = 2 ** len(ATTRIBUTES)
    first = rng.integers(n_styles, size=n)
    second = first ^ rng.integers(1, n_styles, size=n)
    bits = np.stack([first, second], axis=1)[..., None] >> np.arange(len(ATTRIBUTES)) & 1
    return 2 * bits - 1


def _taste(vector: np.ndarray) -> str:
    """Put preferences in words: strong ones, then weak ones, then what hardly matters."""
    share = np.abs(vector) / np.abs(vector).max()
    order = np.argsort(-share, kind="stable")
    words = [POLES[name][int(value > 0)] for name, value in zip(ATTRIBUTES, vector, strict=True)]
    strong = ", ".join(words[j] for j in order if share[j] >= 0.5)
    weak = ", ".join(words[j] for j in order if 0.15 <= share[j] < 0.5)
    none = ", ".join(ATTRIBUTES[j] for j in order if share[j] < 0.15)
    parts = [f"Prefers {strong} answers"]
    parts += [f"slightly prefers {weak} ones"] if weak != "" else []
    parts += [f"indifferent to {none}"] if none != "" else []
    return "; ".join(parts) + "."


def _check_integer(
    name: str, value: object, *, low: int, cure: int, high: float = math.inf
) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return
    allowed = f"a whole number from {low} {'up' if high == math.inf else f'to {high}'}"
    raise bad_value(f"data.{name}", value, allowed, f"Set data.{name}={cure}")
