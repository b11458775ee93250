"""Lengths that fit the backbone."""

from __future__ import annotations

from typing import Any

import pytest

from plrhf.data.usable_rows import choose_lengths


@pytest.mark.parametrize(
    ("given", "positions", "chosen"),
    [
        ((None, None), None, (512, 1024)),
        ((None, None), 2048, (512, 1024)),
        ((None, None), 512, (256, 512)),
        ((None, 700), 512, (256, 512)),
        ((None, 300), 512, (512, 300)),
        ((100, 1024), 502, (100, 502)),
    ],
)
def test_lengths_fit_the_backbone(given: Any, positions: int | None, chosen: Any) -> None:
    options = dict(zip(("max_prompt_tokens", "max_tokens"), given, strict=True))
    notes = choose_lengths(options, positions)
    assert tuple(options.values()) == chosen
    assert len(notes) == (given[1] is not None and chosen[1] < given[1])
    assert choose_lengths(options, positions) == []  # what fits stays
    assert tuple(options.values()) == chosen
