"""Shows texts for several users side by side, with their measured style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plrhf.evaluation.generations import GeneratedText
from plrhf.evaluation.text_quality import text_quality
from plrhf.reporting.page import Section
from plrhf.reporting.runs import Run
from plrhf.reporting.tables import Cell, Table

N_SHOWN = 3  # users and prompts
FOR_ALL = {"generic": "nobody in particular", "reference": "the untouched model"}
"""Writers whose text is the same for all users, with the title shown above it."""

TITLES = {
    "policy": "the policy",
    **FOR_ALL,
    "best_of_policy": "the best of several of the policy's",
    "best_of_reference": "the best of several of the untouched model's",
}

MATTERS = 0.4
"""An attribute matters to a user if the preference for it is at least this fraction of the user's
strongest."""


def generations_section(run: Run) -> Section | None:
    """Show texts for different users on the same prompt; None without generations.jsonl.

    These are the first users and prompts of the file; eval=generate eval.users=[...] chooses others.
    """
    if len(run.texts) == 0:
        return None
    users = list(dict.fromkeys(text.user_id for text in run.texts))[:N_SHOWN]
    by_prompt: dict[str, list[GeneratedText]] = {}
    for text in run.texts:
        if text.user_id in users:
            by_prompt.setdefault(prompt_text(text.prompt), []).append(text)
    samples = [{"prompt": prompt, "people": cards(texts)} for prompt, texts in by_prompt.items()]
    note = (
        "What the model writes for different users on the same prompt. "
        "Others: eval=generate with eval.users=[...]."
    )
    if any(text.style is not None for text in run.texts):
        note += (
            " Bars are measured on the text, in standard deviations of the rows' texts: green where the "
            "person likes it, red where not, grey where it does not matter to them. An arrow says what "
            "they want more (↑) or less (↓) of."
        )
    return Section("Generations", note, table=quality_table(run.texts), samples=samples[:N_SHOWN])


def cards(texts: Sequence[GeneratedText]) -> list[dict[str, Any]]:
    """Return what the page shows of texts for one prompt: a card for each user, then for shared texts."""
    own = {text.user_id: text for text in texts if text.writer == "policy"}
    shown = [_card(text) for text in own.values()]
    for writer, title in FOR_ALL.items():
        same = {text.user_id: text for text in texts if text.writer == writer}
        if len(same) > 0:
            shown.append(_shared_card(title, list(same.values())))
    return shown


def bars(style: Mapping[str, float], taste: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """Return for each attribute a bar's start and width in per cent, and its colour.

    Args:
        style: attribute -> standard deviations. taste: attribute -> the user's preference; None: no
            user.
    """
    strongest = max((abs(value) for value in (taste or {}).values()), default=0.0)
    farthest = max(3.0, *(abs(value) for value in style.values()))
    found = []
    for name, value in style.items():
        wanted = 0.0 if taste is None else taste[name]
        matters = strongest > 0 and abs(wanted) >= MATTERS * strongest
        kind = "other"
        if matters and abs(value) >= 0.05:
            kind = "liked" if wanted * value > 0 else "disliked"
        width = 50 * abs(value) / farthest
        found.append(
            {
                "name": name,
                "arrow": ("↑" if wanted > 0 else "↓") if matters else "",
                "kind": kind,
                "left": format(50 - width if value < 0 else 50, ".1f"),
                "width": format(width, ".1f"),
                "value": format(value, "+.1f"),
            }
        )
    return found


def quality_table(texts: Sequence[GeneratedText]) -> Table | None:
    """Return a table that compares the writers; None for one writer of whom nothing is known."""
    found = text_quality(texts)
    if len(found) == 1 and found[0].score is None and found[0].reference_logp is None:
        return None
    columns = ["written by", "texts", "words", "score", "log-probability a token"]
    rows = [
        [
            Cell(TITLES.get(one.writer, one.writer)),
            Cell(f"{one.n_texts:,}"),
            Cell(f"{one.words:.1f}"),
            Cell(_number(one.score)),
            Cell(_number(one.reference_logp)),
            *(Cell(f"{share:.2f}") for share in one.distinct),
        ]
        for one in found
    ]
    return Table([*columns, "distinct-1", "distinct-2"], [("", rows)], (0,))


def prompt_text(prompt: Any) -> str:
    """Return a prompt as text, with each message of a chat on a line; a single question as it is."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _card(text: GeneratedText) -> dict[str, Any]:
    """Return what the page shows of one user's text."""
    return {
        "user_id": text.user_id,
        "profile": text.profile,
        "score": None if text.score is None else f"score {text.score:.2f}",
        "response": text.response,
        "bars": [] if text.style is None else bars(text.style, text.taste),
    }


def _shared_card(title: str, texts: Sequence[GeneratedText]) -> dict[str, Any]:
    """Return what the page shows of a text that all users share."""
    scores = [f"{text.user_id} {text.score:.2f}" for text in texts if text.score is not None]
    first = texts[0]
    return {
        "user_id": title,
        "profile": None,
        "score": f"scores: {', '.join(scores)}" if len(scores) > 0 else None,
        "response": first.response,
        "bars": [] if first.style is None else bars(first.style, None),
    }


def _number(value: float | None) -> str:
    """Format a number; empty if it is unknown."""
    return "–" if value is None else f"{value:.2f}"
