"""Says which rows tokenising has left out or truncated, and whether any are left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plrhf.core.errors import bad_value
from plrhf.data.reading import ReadReport
from plrhf.data.reasons import Reason
from plrhf.data.rows import SPLITS
from plrhf.data.splits import Splits

CURES = {
    "response too long": "dropped; raise data.max_tokens or set data.on_long_response=truncate",
    "response truncated": "raise data.max_tokens to keep them whole",
    "prompt truncated": "raise data.max_prompt_tokens to keep them whole",
    "earlier turns left out": "raise data.history_turns to keep them",
    "turn computed apart": "its prompt does not begin with the former turn as its tokens were",
}
"""What to do about rows of each kind that tokenising counts."""


MOST_TOKENS = 1024
"""Largest number of tokens of a prompt and response, unless a setting or the backbone says otherwise."""


def choose_lengths(options: dict[str, Any], max_positions: int | None) -> list[str]:
    """Set the lengths that were not given, and fit those that were to the backbone's positions.

    Args:
        options: of `row_tokenizer`; changed in place. max_positions: of the backbone; None: no limit.

    Returns:
        A note, if a length that was given was lowered.
    """
    given, notes = options["max_tokens"], []
    wanted = MOST_TOKENS if given is None else given
    room = wanted if max_positions is None else min(wanted, max_positions)
    if options["max_prompt_tokens"] is None:
        options["max_prompt_tokens"] = (MOST_TOKENS if room == given else room) // 2
    options["max_tokens"] = room
    if given is not None and room < given:
        has = f"the backbone has positions for {room:,} tokens of text"
        notes.append(f"note: data.max_tokens={given} is taken as {room}, as {has}")
    return notes


def check_some_fit(
    splits: Splits,
    fits: NDArray[np.bool_],
    report: ReadReport,
    *,
    n_too_long: int,
    max_tokens: int,
) -> None:
    """Raise a ValueError if a split has rows but none of them fits.

    Args:
        fits: whether each row that was read fits, [N]. n_too_long: number of rows that are too long.
    """
    n_refused = report.refused[Reason.CHAT_TEMPLATE.value]
    for split in SPLITS:
        n_rows = len(splits.indices[split])
        if n_rows == 0 or fits[splits.indices[split]].any():
            continue
        if n_refused > 0 and n_too_long == 0:
            shown = f"0 of {n_rows:,} {split} rows usable"
            allowed = f"prompts that the chat template writes ({n_refused:,} rows refused)"
            first = report.examples[Reason.CHAT_TEMPLATE.value].removesuffix(".")
            raise bad_value("rows", shown, allowed, f"Mend what the first one names: {first}")
        raise bad_value(
            "data.max_tokens",
            max_tokens,
            f"room for some of the {n_rows} {split} rows, and none fits",
            "Raise data.max_tokens",
        )


def tokenizing_notes(report: ReadReport, truncated: Mapping[str, int], total: int) -> list[str]:
    """Return lines for the terminal on rows that were truncated or left out in tokenising.

    Args:
        truncated: number of rows of each kind in `CURES`. total: number of rows.
    """
    notes = []
    reason = Reason.CHAT_TEMPLATE.value
    if report.refused[reason] > 0:
        notes.append(
            f"refused: {report.refused[reason]:,} of {total:,} rows, {reason}, first "
            f"{report.examples[reason]}"
        )
    for what, cure in CURES.items():
        n_rows = truncated[what]
        if n_rows > 0:
            notes.append(f"{what}: {n_rows:,} of {total:,} rows ({n_rows / total:.0%}); {cure}")
    return notes
