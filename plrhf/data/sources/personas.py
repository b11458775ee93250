"""The embedded world: synthetic pairs in readable English, by users with known preferences.

Each prompt asks for a note on a topic, and its two responses differ in style. User u has a vector
v_u of preferences over `ATTRIBUTES` and chooses by the Bradley-Terry model:
P(y1 > y2 | u) = sigmoid(v_u . (a(y1) - a(y2))), where a(y) is the style of y. Since v_u is known, the
best possible accuracy is known too.
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
"""Mean of the preference vectors, in units of `scale`. Users deviate from it by about 1."""

REGIONS = ("coast", "hills", "plains", "city")
PROFESSIONS = ("nurse", "teacher", "farmer", "dentist", "painter")
AGES, READING_HOURS = (18, 80), (0, 14)

# One random stream for each purpose, so that a larger count of one leaves the others unchanged.
_TOPIC_STREAM, _WORLD_STREAM, _USER_STREAM, _PAIR_STREAM = range(4)
_NAMES = (
    *("ada", "ben", "cleo", "dan", "eva", "finn", "gina", "hugo", "iris", "jon", "kira", "leo"),
    *("mira", "noah", "olga", "paul", "rosa", "sam", "tara", "vera"),
)


@dataclass(frozen=True)
class Persona:
    """A synthetic user: true preferences, and the observed features (if any)."""

    vector: np.ndarray  # [A] float64, a preference for each of `ATTRIBUTES`
    type: int | None = None
    features: Mapping[str, int | str] | None = None


@dataclass(frozen=True)
class _Prompt:
    """A prompt about a topic (thing, place)."""

    prompt_id: str
    text: str
    topic: tuple[str, str]


class PersonasSource(Source):
    """Generates the pairs of synthetic users. The same arguments always give the same pairs.

    Args:
        kind: ``individual`` (each user has their own preference vector), ``clusters`` (all users of
            a type share a vector) or ``features`` (the vector is a function of `user_features`).
        n_users: number of users with train, val and test pairs.
        n_unseen_users: number of additional users, with test pairs only.
        pairs_per_user, val_pairs_per_user, test_pairs_per_user: train, val and test pairs of a user.
        n_prompts: number of distinct topics, divided 7 : 1 : 2 into train, val and test.
        n_types: number of user types, for ``clusters`` only.
        scale: strength of preferences. Weaker preferences make noisier choices.
        seed: from 0; draws the preferences, the users and their choices.

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
        self._population = _Population(kind=kind, n_types=n_types, rng=self._rng(_WORLD_STREAM))
        names = [
            f"{_NAMES[index % len(_NAMES)]}-{index:03d}"
            for index in range(n_users + n_unseen_users)
        ]
        self._personas = {name: self._draw_persona(i) for i, name in enumerate(names)}

    @property
    def user_ids(self) -> list[str]:
        """The ids of all users, the `n_users` seen ones first."""
        return list(self._personas)

    def world(self) -> str:
        """Return a hash of the arguments that decide the users' preferences.

        Worlds of other seeds use the same user ids for other users.
        """
        return content_hash(self.kind, self.seed, self.scale, self.n_types)

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield each row with its place, user by user, a user's rows in the order train, val, test."""
        for row, _ in self._pairs:
            yield f"personas:{row['pair_id']}", dict(row)

    def oracle_margins(self) -> dict[str, float]:
        """Return the true margin v_u . (a(chosen) - a(rejected)) of every pair by pair id.

        Where it is negative, noise made the user choose against their own preferences.
        """
        return {row["pair_id"]: margin for row, margin in self._pairs}

    def true_vector(self, user_id: str) -> list[float]:
        """Return the preference vector v_u, a number for each of `ATTRIBUTES`."""
        return self._persona(user_id).vector.tolist()

    def true_type(self, user_id: str) -> int | None:
        """Return the index of the user's type; None unless ``kind=clusters``."""
        return self._persona(user_id).type

    def features(self, user_id: str) -> Mapping[str, int | str] | None:
        """Return the user's observed features; None unless ``kind=features``."""
        return self._persona(user_id).features

    def true_score(self, user_id: str, text: str) -> float:
        """Return how much the user likes any text: v_u . measure(text)."""
        return float(self._persona(user_id).vector @ np.array(measure(text)))

    def profile(self, user_id: str) -> str:
        """Describe in words the user's features and preferred style."""
        persona = self._persona(user_id)
        preferences = _describe_preferences(persona.vector)
        if persona.type is not None:
            return f"Type {persona.type}. {preferences}"
        if persona.features is not None:
            who = "A {profession} of {age} from the {region}, {reading_hours} h of reading a week. "
            return who.format(**persona.features) + preferences
        return preferences

    def group(self, user_id: str) -> str:
        """Name the user's type or, where there are no types, their strongest preference."""
        persona = self._persona(user_id)
        if persona.type is not None:
            return f"type {persona.type}"
        strongest = int(np.abs(persona.vector).argmax())
        return f"prefers {POLES[ATTRIBUTES[strongest]][int(persona.vector[strongest] > 0)]}"

    def _persona(self, user_id: str) -> Persona:
        """Return the user with this id, or raise."""
        if user_id not in self._personas:
            first, last = self.user_ids[0], self.user_ids[-1]
            allowed = f"one of the {len(self._personas)} users {first} to {last}"
            raise bad_value("user_id", user_id, allowed, "Take an id from the rows of this world")
        return self._personas[user_id]

    def _rng(self, *stream: int) -> np.random.Generator:
        """Return a random generator that depends on the seed and these stream numbers alone."""
        return np.random.default_rng([self.seed, *stream])

    def _draw_persona(self, index: int) -> Persona:
        """Draw the user with this index."""
        deviation, type_, features = self._population.draw(self._rng(_USER_STREAM, index))
        vector = self.scale * (np.array(POPULATION_MEAN) + deviation)
        return Persona(vector=vector, type=type_, features=features)

    def _draw_prompts(self, n_prompts: int) -> tuple[list[_Prompt], ...]:
        """Draw distinct topics and divide them into the prompts of train, val and test."""
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
        """All rows, each with its true margin."""
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
        """Yield the rows of one user and split, each with its true margin."""
        persona, prompts = self._personas[user_id], self._prompts[split]
        n = self.pairs_per_split[split]
        rng = self._rng(_PAIR_STREAM, index, split)
        prompt_index = rng.integers(len(prompts), size=n)
        styles = _draw_styles(rng, n)  # [n, 2, A]
        margins = (styles[:, 0] - styles[:, 1]) @ persona.vector  # [n]
        first_wins = rng.random(n) < 1 / (1 + np.exp(-margins))
        draws = rng.random((n, 2, LONG, DRAWS)).tolist()
        for i in range(n):
            prompt = prompts[prompt_index[i]]
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
                # With the hash, pairs of two worlds share an id only if they are the same pair.
                "pair_id": f"{self.kind}-{self.seed}-{user_id}-{SPLITS[split]}-{i:03d}-{content}",
                "split": SPLITS[split],
            }
            yield row, float(margins[i]) * (1 - 2 * winner)


class _Population:
    """Draws how users deviate from `POPULATION_MEAN`: by vectors of length about 1.

    Args:
        kind, n_types: see `PersonasSource`.
        rng: draws the directions that types and features stand for.
    """

    def __init__(self, *, kind: str, n_types: int, rng: np.random.Generator) -> None:
        self.kind = kind
        self.types = _spread_directions(rng, n_types)
        self.age, self.reading = _spread_directions(rng, 1)[0], _spread_directions(rng, 1)[0]
        self.regions = _spread_directions(rng, len(REGIONS))
        self.professions = _spread_directions(rng, len(PROFESSIONS))
        self.age_by_profession = _spread_directions(rng, len(PROFESSIONS))

    def draw(
        self, rng: np.random.Generator
    ) -> tuple[np.ndarray, int | None, dict[str, Any] | None]:
        """Draw a user: deviation [A] from the mean, type (or None) and features (or None)."""
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
        return _normalise(rng.standard_normal(len(ATTRIBUTES))), None, None

    def from_features(
        self, *, age: int, reading_hours: int, region: str, profession: str
    ) -> np.ndarray:
        """Return the deviation [A] of a user with these features.

        The effect of age depends on the profession, so the function is not additive.
        """
        standard_age = _standardise(age, AGES)
        job = PROFESSIONS.index(profession)
        # The squared weights sum to 1, so preferences are as strong as those of the other kinds.
        return (
            0.55 * standard_age * self.age
            + 0.35 * _standardise(reading_hours, READING_HOURS) * self.reading
            + 0.50 * self.regions[REGIONS.index(region)]
            + 0.50 * self.professions[job]
            + 0.27 * standard_age * self.age_by_profession[job]
        )


def _standardise(value: int, bounds: tuple[int, int]) -> float:
    """Scale a uniform integer from low to high to mean 0 and standard deviation 1."""
    low, high = bounds
    return (value - (low + high) / 2) / math.sqrt(((high - low + 1) ** 2 - 1) / 12)


def _normalise(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors [..., A] to length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _spread_directions(rng: np.random.Generator, n: int) -> np.ndarray:
    """Draw n unit vectors [n, A] that point in very different directions.

    Of 200 draws, this is the one whose two most similar vectors have the smallest cosine.
    """
    if n == 1:
        return _normalise(rng.standard_normal((1, len(ATTRIBUTES))))
    draws = rng.standard_normal((200, n, len(ATTRIBUTES)))
    draws = _normalise(draws - draws.mean(axis=1, keepdims=True))
    # Minus 2 on the diagonal: a vector's cosine with itself is never the largest.
    cosines = draws @ draws.transpose(0, 2, 1) - 2 * np.eye(n)
    return draws[cosines.max(axis=(1, 2)).argmin()]


def _draw_styles(rng: np.random.Generator, n: int) -> np.ndarray:
    """Draw n pairs of styles [n, 2, A] of -1 and +1, uniformly among pairs of different styles."""
    n_styles = 2 ** len(ATTRIBUTES)
    first = rng.integers(n_styles, size=n)
    second = first ^ rng.integers(1, n_styles, size=n)
    bits = np.stack([first, second], axis=1)[..., None] >> np.arange(len(ATTRIBUTES)) & 1
    return 2 * bits - 1


def _describe_preferences(vector: np.ndarray) -> str:
    """Describe a preference vector in words: strong preferences, weak ones, and indifference."""
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
    """Raise unless the setting is a whole number from `low` to `high`; `cure` is a good value."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return
    allowed = f"a whole number from {low} {'up' if high == math.inf else f'to {high}'}"
    raise bad_value(f"data.{name}", value, allowed, f"Set data.{name}={cure}")
