"""Statistics that show whether a policy still writes fluent text, by writer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from plrhf.evaluation.generations import GeneratedText


@dataclass(frozen=True)
class TextQuality:
    """Means over the texts of one writer.

    Attributes:
        words: words per text. score: how much users like their texts, in log odds; None if unknown.
        reference_logp: log-probability per token under the reference, in nats; None if not computed.
        distinct: fraction of distinct n-grams in a user's texts, for n = 1 and 2, mean over users.
    """

    writer: str
    n_texts: int
    words: float
    score: float | None
    reference_logp: float | None
    distinct: tuple[float, float]


def distinct_share(texts: Iterable[str], n: int) -> float:
    """Return the fraction of distinct n-grams of words in texts (distinct-n, arXiv 1510.03055)."""
    grams: list[tuple[str, ...]] = []
    for text in texts:
        words = text.lower().split()
        grams += zip(*(words[start:] for start in range(n)), strict=False)
    return len(set(grams)) / max(1, len(grams))


def text_quality(texts: Sequence[GeneratedText]) -> list[TextQuality]:
    """Summarise texts by writer, in the order of their first appearance.

    Distinct n-grams are counted for each user separately, since more texts have more repetition.
    """
    found = []
    for writer in dict.fromkeys(text.writer for text in texts):
        own = [text for text in texts if text.writer == writer]
        by_user: dict[str, list[str]] = {}
        for text in own:
            by_user.setdefault(text.user_id, []).append(text.response)
        shares = [np.mean([distinct_share(one, n) for one in by_user.values()]) for n in (1, 2)]
        found.append(
            TextQuality(
                writer=writer,
                n_texts=len(own),
                words=float(np.mean([len(text.response.split()) for text in own])),
                score=_mean([text.score for text in own]),
                reference_logp=_mean([text.reference_logp for text in own]),
                distinct=(float(shares[0]), float(shares[1])),
            )
        )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if a value is unknown."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) > 0 else None
