"""Numbers of texts by writer, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from plrhf.evaluation.generations import GeneratedText
from plrhf.evaluation.text_quality import distinct_share, text_quality


def text(user: str, writer: str, response: str, **known: Any) -> GeneratedText:
    fields: dict[str, Any] = {"prompt": "Why?", "prompt_id": "why", "profile": None, "score": None}
    fields |= {"user_id": user, "writer": writer, "response": response, "user_features": None}
    return GeneratedText(**{**fields, **known})


def test_distinct_n_grams() -> None:
    texts = ["the cat and the dog", "The cat sat"]  # 8 words, 5 distinct; 6 pairs, 5 distinct
    assert distinct_share(texts, 1) == pytest.approx(5 / 8)
    assert distinct_share(texts, 2) == pytest.approx(5 / 6)
    assert distinct_share(["one"], 2) == 0


def test_writers_are_compared_user_by_user() -> None:
    """Two users with the same text: neither repeats anything, though together they do."""
    texts = [
        text("ann", "policy", "so it is", score=1.0, reference_logp=-2.0),
        text("bob", "policy", "so it is", score=2.0, reference_logp=-4.0),
        text("ann", "reference", "no no no no", score=-1.0),
        text("bob", "reference", "no no no no"),
    ]
    policy, reference = text_quality(texts)
    assert (policy.writer, policy.n_texts, policy.words) == ("policy", 2, 3)
    assert (policy.score, policy.reference_logp, policy.distinct) == (1.5, -3.0, (1.0, 1.0))
    assert (reference.score, reference.reference_logp) == (None, None)
    assert reference.distinct == (1 / 4, 1 / 3)
