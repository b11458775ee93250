"""The base of simulated worlds: users with known preferences, who choose by the Bradley-Terry model.

User u has a vector v_u of preferences over attributes that are measured on texts: P(y1 > y2 | u) =
sigmoid(v_u . (a(y1) - a(y2))), where a(y) is the style of y. Since v_u is known, the best possible
accuracy is known too, and any new text can be judged.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
from pydantic import Field

from plrhf.core.checks import NonNegativeInt, PositiveFloat, PositiveInt, check_arguments
from plrhf.core.errors import bad_value
from plrhf.data.digests import content_hash
from plrhf.data.rows import SPLITS
from plrhf.data.sources.base import Source

T = TypeVar("T")

Kind = Literal["individual", "clusters", "features", "strangers"]
KINDS: tuple[Kind, ...] = get_args(Kind)

REGIONS = ("coast", "hills", "plains", "city")
PROFESSIONS = ("nurse", "teacher", "farmer", "dentist", "painter")
AGES, READING_HOURS = (18, 80), (0, 14)

# One random stream for each purpose, so that a larger count of one leaves the others unchanged.
TOPIC_STREAM, _WORLD_STREAM, _USER_STREAM, _PAIR_STREAM = range(4)
_NAMES = (
    *("ada", "ben", "cleo", "dan", "eva", "finn", "gina", "hugo", "iris", "jon", "kira", "leo"),
    *("mira", "noah", "olga", "paul", "rosa", "sam", "tara", "vera"),
)


@dataclass(frozen=True)
class Persona:
    """A simulated user: true preferences, and the observed features (if any)."""

    vector: np.ndarray  # [A] float64, a preference for each attribute
    type: int | None = None
    features: Mapping[str, int | str] | None = None


@check_arguments("data")
class SimulatedSource(Source):
    """Generates the pairs of simulated users. The same arguments always give the same pairs.

    A subclass defines the pairs (`draw_pairs`) and how a text's style is measured (`style`).

    Args:
        kind: ``individual`` (each user has their own preference vector), ``clusters`` (all users of a
            type share a vector), ``features`` (the vector is a function of `user_features`) or
            ``strangers`` (unseen users differ from the mean in directions in which no seen user does).
        n_users: number of users with train, val and test pairs.
        n_unseen_users: number of additional users, with test pairs only.
        pairs_per_user, val_pairs_per_user, test_pairs_per_user: train, val and test pairs of a user.
        n_types: number of user types, for ``clusters`` only.
        scale: strength of preferences. Weaker preferences make noisier choices.
        seed: from 0; of the preferences, the users and their choices.

    Raises:
        ValueError: an argument is out of range.

    Attributes:
        name: name of the source, with which places begin.
        poles: words for little and for much of each attribute, by attribute.
        population_mean: mean of the preference vectors, in units of `scale`; users deviate by about 1.
    """

    name: ClassVar[str]
    poles: ClassVar[Mapping[str, tuple[str, str]]]
    population_mean: ClassVar[tuple[float, ...]]

    def __init__(
        self,
        *,
        kind: Kind,
        n_users: PositiveInt = 100,
        n_unseen_users: NonNegativeInt = 20,
        pairs_per_user: PositiveInt = 100,
        val_pairs_per_user: NonNegativeInt = 10,
        test_pairs_per_user: NonNegativeInt = 20,
        n_types: Annotated[int, Field(ge=2)] = 4,
        scale: PositiveFloat = 1.8,
        seed: NonNegativeInt = 0,
    ) -> None:
        self.kind, self.n_users, self.scale, self.seed = kind, n_users, scale, seed
        self.n_types = n_types
        self.pairs_per_split = (pairs_per_user, val_pairs_per_user, test_pairs_per_user)
        self._population = Population(
            kind=kind, n_types=n_types, n_attributes=len(self.poles), rng=self.rng(_WORLD_STREAM)
        )
        names = [
            f"{_NAMES[index % len(_NAMES)]}-{index:03d}"
            for index in range(n_users + n_unseen_users)
        ]
        self._personas = {name: self._draw_persona(i) for i, name in enumerate(names)}

    @abstractmethod
    def draw_pairs(
        self, rng: np.random.Generator, user_id: str, split: int, n: int
    ) -> Iterator[tuple[dict[str, Any], float]]:
        """Yield n rows of a user in a split, made by `row`, each with its true margin."""

    @abstractmethod
    def style(self, text: str) -> np.ndarray:
        """Measure a(y), [A] float64, on any text."""

    @property
    def attributes(self) -> list[str]:
        """Names of the attributes, in the order of every style and preference vector."""
        return list(self.poles)

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
            yield f"{self.name}:{row['pair_id']}", dict(row)

    def oracle_margins(self) -> dict[str, float]:
        """Return the true margin v_u . (a(chosen) - a(rejected)) of every pair by pair id.

        Where it is negative, noise made the user choose against their own preferences.
        """
        return {row["pair_id"]: margin for row, margin in self._pairs}

    def true_vector(self, user_id: str) -> list[float]:
        """Return the preference vector v_u, a number for each of `attributes`."""
        return self._persona(user_id).vector.tolist()

    def true_type(self, user_id: str) -> int | None:
        """Return the index of the user's type; None unless ``kind=clusters``."""
        return self._persona(user_id).type

    def features(self, user_id: str) -> Mapping[str, int | str] | None:
        """Return the user's observed features; None unless ``kind=features``."""
        return self._persona(user_id).features

    def true_score(self, user_id: str, text: str) -> float:
        """Return how much the user likes any text: v_u . a(text)."""
        return float(self._persona(user_id).vector @ self.style(text))

    def measured_style(self, text: str) -> dict[str, float]:
        return dict(zip(self.attributes, self.style(text).tolist(), strict=True))

    def taste(self, user_id: str) -> dict[str, float]:
        return dict(zip(self.attributes, self.true_vector(user_id), strict=True))

    def profile(self, user_id: str) -> str:
        """Describe in words the user's features and preferred style."""
        persona = self._persona(user_id)
        preferences = _describe_preferences(persona.vector, self.poles)
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
        return (
            f"prefers {self.poles[self.attributes[strongest]][int(persona.vector[strongest] > 0)]}"
        )

    def row(
        self,
        place: tuple[str, int, int],
        *,
        prompt: str,
        prompt_id: str,
        chosen: str,
        rejected: str,
    ) -> dict[str, Any]:
        """Make a row. `place` is the user's id, the split, and the number of the pair among theirs."""
        user_id, split, number = place
        content = content_hash(prompt, chosen, rejected)
        return {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "user_id": user_id,
            "user_features": self._persona(user_id).features,
            "prompt_id": prompt_id,
            # With the hash, pairs of two worlds share an id only if they are the same pair.
            "pair_id": f"{self.kind}-{self.seed}-{user_id}-{SPLITS[split]}-{number:03d}-{content}",
            "split": SPLITS[split],
        }

    def _persona(self, user_id: str) -> Persona:
        """Return the user with this id, or raise."""
        if user_id not in self._personas:
            first, last = self.user_ids[0], self.user_ids[-1]
            allowed = f"one of the {len(self._personas)} users {first} to {last}"
            raise bad_value("user_id", user_id, allowed, "Take an id from the rows of this world")
        return self._personas[user_id]

    def rng(self, *stream: int) -> np.random.Generator:
        """Return a random generator that depends on the seed and these stream numbers alone."""
        return np.random.default_rng([self.seed, *stream])

    def _draw_persona(self, index: int) -> Persona:
        """Draw the user with this index."""
        deviation, type_, features = self._population.draw(
            self.rng(_USER_STREAM, index), is_seen=index < self.n_users
        )
        vector = self.scale * (np.array(self.population_mean) + deviation)
        return Persona(vector=vector, type=type_, features=features)

    @cached_property
    def _pairs(self) -> list[tuple[dict[str, Any], float]]:
        """All rows, each with its true margin."""
        return [
            pair
            for index, user_id in enumerate(self._personas)
            for split, n in enumerate(self.pairs_per_split)
            if index < self.n_users or SPLITS[split] == "test"
            for pair in self.draw_pairs(self.rng(_PAIR_STREAM, index, split), user_id, split, n)
        ]


def divide(items: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
    """Divide items 7 : 1 : 2 into those of train, val and test; val and test have at least one."""
    n_val, n_test = max(1, len(items) // 10), max(1, len(items) // 5)
    return [*items[n_val + n_test :]], [*items[:n_val]], [*items[n_val : n_val + n_test]]


def choose(rng: np.random.Generator, margins: np.ndarray) -> np.ndarray:
    """Draw by Bradley-Terry whether the first of two texts wins, [N] bool; margins [N] favour the first."""
    return rng.random(len(margins)) < 1 / (1 + np.exp(-margins))


class Population:
    """Draws how users deviate from the population's mean: by vectors of length about 1.

    Args:
        kind, n_types: see `SimulatedSource`. n_attributes: A.
        rng: draws the directions that types and features stand for.
    """

    def __init__(
        self, *, kind: Kind, n_types: int, n_attributes: int, rng: np.random.Generator
    ) -> None:
        self.kind, self.n_attributes = kind, n_attributes
        self.types = _spread_directions(rng, n_types, n_attributes)
        self.age = _spread_directions(rng, 1, n_attributes)[0]
        self.reading = _spread_directions(rng, 1, n_attributes)[0]
        self.regions = _spread_directions(rng, len(REGIONS), n_attributes)
        self.professions = _spread_directions(rng, len(PROFESSIONS), n_attributes)
        self.age_by_profession = _spread_directions(rng, len(PROFESSIONS), n_attributes)
        # Orthonormal rows; of strangers, the first half is for seen users, the others for unseen ones.
        self.directions = np.linalg.qr(rng.standard_normal((n_attributes, n_attributes)))[0]

    def draw(
        self, rng: np.random.Generator, *, is_seen: bool = True
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
        if self.kind == "strangers":
            half = self.n_attributes // 2
            own = self.directions[:half] if is_seen else self.directions[half:]
            return _normalise(rng.standard_normal(len(own)) @ own), None, None
        return _normalise(rng.standard_normal(self.n_attributes)), None, None

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


def _spread_directions(rng: np.random.Generator, n: int, n_attributes: int) -> np.ndarray:
    """Draw n unit vectors [n, A] that point in very different directions.

    Of 200 draws, this is the one whose two most similar vectors have the smallest cosine.
    """
    if n == 1:
        return _normalise(rng.standard_normal((1, n_attributes)))
    draws = rng.standard_normal((200, n, n_attributes))
    draws = _normalise(draws - draws.mean(axis=1, keepdims=True))
    # Minus 2 on the diagonal: a vector's cosine with itself is never the largest.
    cosines = draws @ draws.transpose(0, 2, 1) - 2 * np.eye(n)
    return draws[cosines.max(axis=(1, 2)).argmin()]


def _describe_preferences(vector: np.ndarray, poles: Mapping[str, tuple[str, str]]) -> str:
    """Describe a preference vector in words: strong preferences, weak ones, and indifference."""
    share = np.abs(vector) / np.abs(vector).max()
    order = np.argsort(-share, kind="stable")
    words = [both[int(value > 0)] for both, value in zip(poles.values(), vector, strict=True)]
    strong = ", ".join(words[j] for j in order if share[j] >= 0.5)
    weak = ", ".join(words[j] for j in order if 0.15 <= share[j] < 0.5)
    none = ", ".join(list(poles)[j] for j in order if share[j] < 0.15)
    parts = [f"Prefers {strong} answers"]
    parts += [f"slightly prefers {weak} ones"] if weak != "" else []
    parts += [f"indifferent to {none}"] if none != "" else []
    return "; ".join(parts) + "."
