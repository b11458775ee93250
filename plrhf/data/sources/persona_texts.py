"""Writes texts of the embedded world in a given style, and measures the style of any text.

A style is a level, -1 or +1, for each of `ATTRIBUTES`. Every sentence has words that mark its level
of each attribute but length, so the style can be measured on any part of a text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ATTRIBUTES = ("length", "detail", "enthusiasm", "hedging")
"""Names of the style attributes, in the order of every style and preference vector."""

POLES = {
    "length": ("short", "long"),
    "detail": ("general", "concrete"),
    "enthusiasm": ("calm", "enthusiastic"),
    "hedging": ("confident", "cautious"),
}
"""The words for level -1 and level +1 of each attribute."""

SHORT, LONG = 1, 3
"""Number of sentences of a response whose length is -1 and +1."""

THINGS = (
    *("lighthouse", "bakery", "market", "library", "harbour", "bridge", "museum", "theatre"),
    *("garden", "station", "castle", "chapel", "mill", "school", "inn", "pier"),
    *("park", "square", "tower", "orchard", "forge", "ferry", "bookshop", "farm"),
)
PLACES = (
    *("Marlow", "Alden", "Brill", "Corby", "Denby", "Elton", "Farley", "Gorton", "Hadley"),
    *("Ilford", "Kirby", "Linton", "Malden", "Norton", "Oakham", "Preston", "Rugby", "Selby"),
    *("Tilbury", "Walton"),
)
TOPICS = tuple((thing, place) for place in PLACES for thing in THINGS)
"""All topics (thing, place) that a prompt can ask about."""

PROMPTS = (
    "Write a note about the {} at {}.",
    "Tell me about the {} at {}.",
    "Describe the {} at {} for a visitor.",
    "What can you say about the {} at {}?",
)

_OPENERS = (
    ("certainly", "clearly", "surely", "without doubt", "no doubt"),
    ("perhaps", "maybe", "possibly", "it seems", "I suspect"),
)
_VERBS = (
    ("is", "is always", "is definitely", "will be"),
    ("might be", "may be", "could be", "may seem"),
)
_ADJECTIVES = (
    ("plain", "simple", "modest", "quiet", "tidy", "calm"),
    ("wonderful", "delightful", "glorious", "splendid", "marvellous", "brilliant"),
)
_ENDS = (".", "!")
_GENERAL = (
    *("somewhere around the area", "at some point in time", "in some way or another"),
    *("every now and then", "for quite a while", "for all sorts of reasons"),
)
_NUMBERS = ("5", "8", "12", "14", "20", "25", "30", "40", "60")
_DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
_STREETS = ("Rose Lane", "Dock Street", "King Street", "Abbey Lane")
_CONCRETE = (
    *(f"at {number} {street}" for number in _NUMBERS for street in _STREETS),
    *(f"at {number} on {day}" for number in ("8", "9", "10", "11") for day in _DAYS),
    *(f"just {number} steps from {street}" for number in _NUMBERS for street in _STREETS),
)
_DETAILS = (_GENERAL, _CONCRETE)
_ASPECTS = (
    *("the view", "the light", "the old wall", "the path", "the sound", "the air"),
    *("its story", "its roof", "the colour", "this {thing}"),
)
_SUBJECTS = ("the {thing}", "the {thing} at {place}")
_NOUNS = ("sight", "thing", "feature", "memory")
_FUNCTION_WORDS = ("a", "all", "and", "for", "from", "I", "in", "it", "of", "on", "or")
_CONNECTIVES = (("first", "to begin"), ("then", "also", "next"), ("lastly", "finally"))
_FRAMES = (
    "{opener} {subject} {verb} {adjective} {detail}",
    "{opener} {subject} {verb} a {adjective} {noun} {detail}",
    "{detail}, {opener} {subject} {verb} {adjective}",
    "{opener} {detail} {subject} {verb} a {adjective} {noun}",
)
DRAWS = 8
"""Number of random numbers that decide the wording of one sentence."""


def _words(text: str) -> list[str]:
    """Split a text into lower-case words and exclamation marks, with ``#`` for every number."""
    return re.findall(r"[a-z]+|[#!]", re.sub(r"\d+", "#", text.lower()))


def _word_set(phrases: Sequence[str]) -> frozenset[str]:
    """Return the distinct words of all phrases."""
    return frozenset(word for phrase in phrases for word in _words(phrase))


def _find_markers() -> dict[str, tuple[int, int]]:
    """Find the words that are used at one level of one attribute alone.

    Returns:
        The index of the attribute and the level, -1 or +1, of each such word.
    """
    topical = (*THINGS, *PLACES, *_ASPECTS, *_SUBJECTS, *_NOUNS)
    neutral = _word_set((*topical, *_FUNCTION_WORDS, *(c for bank in _CONNECTIVES for c in bank)))
    banks = {
        "detail": _DETAILS,
        "enthusiasm": tuple((*_ADJECTIVES[level], _ENDS[level]) for level in (0, 1)),
        "hedging": tuple((*_OPENERS[level], *_VERBS[level]) for level in (0, 1)),
    }
    return {
        word: (ATTRIBUTES.index(name), 2 * level - 1)
        for name, phrases in banks.items()
        for level in (0, 1)
        for word in _word_set(phrases[level]) - _word_set(phrases[1 - level]) - neutral
    }


_MARKERS = _find_markers()


def _pick(bank: Sequence[str], draw: float) -> str:
    """Return the phrase of the bank that a random number from [0, 1) stands for."""
    return bank[int(draw * len(bank))]


def _write_sentence(
    index: int, thing: str, place: str, levels: tuple[int, int, int, int], draws: Sequence[float]
) -> str:
    """Write the sentence with this index in a response.

    Args:
        levels: 0 or 1 for each of `ATTRIBUTES`.
        draws: `DRAWS` numbers from [0, 1), which choose the words.
    """
    length, detail, enthusiasm, hedging = levels
    frame, connective, opener, subject, verb, adjective, noun, particular = draws
    text = _pick(_FRAMES, frame).format(
        opener=_pick(_OPENERS[hedging], opener),
        subject=_pick((_SUBJECTS, _ASPECTS)[index > 0], subject).format(thing=thing, place=place),
        verb=_pick(_VERBS[hedging], verb),
        adjective=_pick(_ADJECTIVES[enthusiasm], adjective),
        noun=_pick(_NOUNS, noun),
        detail=_pick(_DETAILS[detail], particular),
    )
    if length == 1:
        text = f"{_pick(_CONNECTIVES[index], connective)}, {text}"
    return text[0].upper() + text[1:] + _ENDS[enthusiasm]


def write(*, topic: tuple[str, str], style: Sequence[int], draws: Sequence[Sequence[float]]) -> str:
    """Write a response about a topic in a style.

    Args:
        topic: one of `TOPICS`.
        style: a level, -1 or +1, for each of `ATTRIBUTES`.
        draws: [LONG, DRAWS] numbers from [0, 1), which choose the words of each sentence. A short
            response uses the first rows only.
    """
    length, detail, enthusiasm, hedging = ((level + 1) // 2 for level in style)
    levels = (length, detail, enthusiasm, hedging)
    used = draws[: (SHORT, LONG)[length]]
    return " ".join(_write_sentence(index, *topic, levels, row) for index, row in enumerate(used))


def measure(text: str) -> tuple[float, ...]:
    """Measure the style of any text, e.g. of a generated one.

    Length is the number of sentences, scaled so that 1 gives -1 and 3 gives +1, and clipped there.
    Every other attribute is the mean over sentences of +1, -1 or 0: whether the sentence has more
    words that mark level +1, more that mark level -1, or as many of both. A text without words has
    the style (-1, 0, 0, 0).

    Returns:
        A number from -1 to +1 for each of `ATTRIBUTES`.
    """
    sentences = [_words(part) for part in re.findall(r"[^.!?]+[.!?]*", text)]
    sentences = [words for words in sentences if any(word != "!" for word in words)]
    middle, half = (LONG + SHORT) / 2, (LONG - SHORT) / 2
    length = min(1.0, max(-1.0, (len(sentences) - middle) / half))
    signs = [_sentence_signs(words) for words in sentences]
    shares = (sum(column) / len(signs) for column in zip(*signs, strict=True))
    return (length, *shares) if signs else (length, 0.0, 0.0, 0.0)


def _sentence_signs(words: Sequence[str]) -> list[int]:
    """Return +1, -1 or 0 for each of `ATTRIBUTES[1:]`: which level more words of a sentence mark."""
    balance = [0] * len(ATTRIBUTES)
    for word in words:
        if word in _MARKERS:
            attribute, level = _MARKERS[word]
            balance[attribute] += level
    return [(total > 0) - (total < 0) for total in balance[1:]]
