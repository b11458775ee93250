"""The one form of all errors about a user's input: field, value, what is allowed, cure."""

import re

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and line end; characters that turn the order of others; half ones."""


class BadValue(ValueError):
    """An error in the user's input. Its message is one line, which is shown without a traceback."""


def bad_value(field: str, value: object, allowed: str, cure: str) -> BadValue:
    """Return (not raise) the error that says on one line what is wrong and how to fix it.

    Args:
        field: the setting or row field as its user writes it, e.g. ``model.alpha``.
        value: the value found; shown by `repr`, cut at 80 characters.
        allowed: the allowed values, as a noun phrase, e.g. ``a number from 0 to 1``.
        cure: one imperative sentence, e.g. ``Set model.alpha=0.5``.
    """
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return BadValue(f"{field}={shown} is not allowed: expected {allowed}. {cure}.")


def printable(text: str) -> str:
    """Escape line ends and control characters, which a terminal would execute."""
    return "".join(one if one.isprintable() else _escape(one) for one in text)


def visible(text: str) -> str:
    """Escape `CONTROLS`, for pages: those characters are not shown, or change how others are."""
    return CONTROLS.sub(lambda one: _escape(one[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
