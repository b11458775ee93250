"""The one form every error about a user's input takes: field, value, what is allowed, cure."""


class BadValue(ValueError):
    """Something the user gave that cannot be used; its message is one line and needs no traceback."""


def bad_value(field: str, value: object, allowed: str, cure: str) -> BadValue:
    """Return (not raise) the error that says on one line what is wrong and how to mend it.

    Args:
        field: the setting or row field by the name its user wrote, e.g. ``model.alpha``.
        value: what was found there; shown by `repr`, cut at 80 characters.
        allowed: what may stand there, as a noun phrase, e.g. ``a number from 0 to 1``.
        cure: one imperative sentence, e.g. ``Set model.alpha=0.5``.
    """
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return BadValue(f"{field}={shown} is not allowed: expected {allowed}. {cure}.")
