"""Measures the style of any text by counting; no model is needed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

POLES = {
    "length": ("short", "long"),
    "sentence length": ("short-sentenced", "long-sentenced"),
    "lists": ("running", "listed"),
    "exclamations": ("calm", "exclaiming"),
    "questions": ("telling", "asking"),
    "first person": ("impersonal", "personal"),
    "second person": ("general", "addressed"),
    "hedging": ("confident", "cautious"),
    "word length": ("plain-worded", "long-worded"),
    "variety": ("repetitive", "varied"),
}
"""The words for little and much of each attribute, in the order of every preference vector."""

ATTRIBUTES = tuple(POLES)

WINDOW = 25
"""Number of words in which distinct words are counted, since longer texts repeat more words whatever
their style."""

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+(?:[.,:]\d+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$|[\"')\]])|\n+")
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*•–]|\(?\d{1,2}[.)])[ \t]+\S", re.MULTILINE)
_FIRST_PERSON = frozenset(
    ("i", "me", "my", "mine", "myself", "we", "us", "our", "ours", "ourselves")
)
_SECOND_PERSON = frozenset(("you", "your", "yours", "yourself", "yourselves"))
_HEDGES = frozenset(
    (
        *("maybe", "perhaps", "possibly", "probably", "likely", "might", "may", "could", "would"),
        *("seem", "seems", "usually", "often", "sometimes", "generally", "typically", "somewhat"),
        *("rather", "about", "almost", "think", "believe", "guess", "suppose", "depends"),
    )
)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; a number is a word, ``I'm`` is one."""
    return [word.lower().replace("’", "'") for word in _WORD.findall(text)]


def count_sentences(text: str) -> int:
    """Count the sentences of a text; a line break also ends a sentence."""
    return sum(_WORD.search(piece) is not None for piece in _SENTENCE_END.split(text))


def measure(text: str) -> tuple[float, ...]:
    """Measure each of `ATTRIBUTES` on a text; the values are not standardised.

    Length is log(1 + words), sentence length log(1 + words per sentence), lists log(1 + items).
    Exclamation and question marks are counted per sentence, at most one of each. Persons and hedges are
    fractions of the words. Word length is letters per word. Variety is the mean fraction of distinct
    words in windows of `WINDOW` words. For a text without words all are 0.
    """
    words, n_sentences = words_of(text), count_sentences(text)
    if len(words) == 0:
        return (0.0,) * len(ATTRIBUTES)
    return (
        math.log1p(len(words)),
        math.log1p(len(words) / n_sentences),
        math.log1p(len(_LIST_ITEM.findall(text))),
        min(1.0, text.count("!") / n_sentences),
        min(1.0, text.count("?") / n_sentences),
        _share(words, lambda word: word.partition("'")[0] in _FIRST_PERSON),
        _share(words, lambda word: word.partition("'")[0] in _SECOND_PERSON),
        _share(words, _HEDGES.__contains__),
        sum(map(len, words)) / len(words),
        _variety(words),
    )


def _share(words: Sequence[str], has: Callable[[str], bool]) -> float:
    """Return the fraction of words for which `has` is true."""
    return sum(map(has, words)) / len(words)


def _variety(words: Sequence[str]) -> float:
    """Return the mean fraction of distinct words over all windows of `WINDOW` words."""
    width = min(WINDOW, len(words))
    starts = range(len(words) - width + 1)
    return sum(len(set(words[start : start + width])) for start in starts) / (width * len(starts))
