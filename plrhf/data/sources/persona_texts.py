"""The language of the embedded world: topics, sentences in sixteen styles, and their reading.

A style is one level, -1 or +1, for each of `ATTRIBUTES`. Each sentence of a response bears a marker
of every attribute at both poles, so that a style can be read off any stretch of the text.
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
"""What a person calls level -1 and level +1 of an attribute."""

SHORT, LONG = 1, 3
"""Sentences of a response with length -1 and +1."""

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
"""Every (thing, place) a prompt can ask about."""

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
"""Random numbers that one sentence takes."""


def _words(text: str) -> list[str]:
    """Lower-case words and exclamation marks of a text; any number reads as ``#``."""
    return re.findall(r"[a-z]+|[#!]", re.sub(r"\d+", "#", text.lower()))


def _bag(phrases: Sequence[str]) -> frozenset[str]:
    return frozenset(word for phrase in phrases for word in _words(phrase))


def _markers() -> dict[str, tuple[int, int]]:
    """Return word -> (attribute, pole -1 or +1) for the words that only this pole makes use of."""
    topical = (*THINGS, *PLACES, *_ASPECTS, *_SUBJECTS, *_NOUNS)
    neutral = _bag((*topical, *_FUNCTION_WORDS, *(c for bank in _CONNECTIVES for c in bank)))
    banks = {
        "detail": _DETAILS,
        "enthusiasm": tuple((*_ADJECTIVES[level], _ENDS[level]) for level in (0, 1)),
        "hedging": tuple((*_OPENERS[level], *_VERBS[level]) for level in (0, 1)),
    }
    return {
        word: (ATTRIBUTES.index(name), 2 * level - 1)
        for name, poles in banks.items()
        for level in (0, 1)
        for word in _bag(poles[level]) - _bag(poles[1 - level]) - neutral
    }


_MARKERS = _markers()


def _pick(bank: Sequence[str], draw: float) -> str:
    return bank[int(draw * len(bank))]


def _sentence(
    index: int, thing: str, place: str, poles: tuple[int, int, int, int], draws: Sequence[float]
) -> str:
    """Write sentence `index` of a response; `poles` are 0 or 1, `draws` are DRAWS from [0, 1)."""
    length, detail, enthusiasm, hedging = poles
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
    """Write a response about a topic in a style; whatever the style leaves open follows `draws`.

    Args:
        topic: one of `TOPICS`.
        style: a level, -1 or +1, for each of `ATTRIBUTES`.
        draws: [LONG, DRAWS] numbers from [0, 1); a short response leaves the later rows unused.
    """
    length, detail, enthusiasm, hedging = ((level + 1) // 2 for level in style)
    poles = (length, detail, enthusiasm, hedging)
    used = draws[: (SHORT, LONG)[length]]
    return " ".join(_sentence(index, *topic, poles, row) for index, row in enumerate(used))


def measure(text: str) -> tuple[float, ...]:
    """Read the style of any text, so that generated text can be judged; returns one number from
    -1 to +1 for each of `ATTRIBUTES`.

    Length is the number of sentences, 1 to 3, put on -1 to +1. Any other attribute is the share of
    sentences with more markers of its pole +1 than of -1, less the share with fewer; sentences
    without markers count as 0, and a text without words has the style (-1, 0, 0, 0).
    """
    sentences = [_words(part) for part in re.findall(r"[^.!?]+[.!?]*", text)]
    sentences = [words for words in sentences if any(word != "!" for word in words)]
    middle, half = (LONG + SHORT) / 2, (LONG - SHORT) / 2
    length = min(1.0, max(-1.0, (len(sentences) - middle) / half))
    signs = [_sentence_signs(words) for words in sentences]
    shares = (sum(column) / len(signs) for column in zip(*signs, strict=True))
    return (length, *shares) if signs else (length, 0.0, 0.0, 0.0)


def _sentence_signs(words: Sequence[str]) -> list[int]:
    """Return -1, 0 or +1 for each of `ATTRIBUTES[1:]`: which pole has more markers here."""
    balance = [0] * len(ATTRIBUTES)
    for word in words:
        if word in _MARKERS:
            attribute, pole = _MARKERS[word]
            balance[attribute] += pole
    return [(total > 0) - (total < 0) for total in balance[1:]]
