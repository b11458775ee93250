"""Shows how far long work is: by a bar on a terminal, and elsewhere by a line now and then."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from torch import distributed
from tqdm import tqdm

Item = TypeVar("Item")

SILENT = 2.0
"""Seconds after which work counts as long."""

LINE_EVERY = 60.0
"""Seconds between two lines where there is no terminal."""


class Progress(tqdm):
    """Shows on one of several processes how much of a work is done, and how long the rest takes.

    Work that takes less than `SILENT` (without a terminal: `LINE_EVERY`) seconds shows nothing.

    Args:
        what: the work, such as "tokenising". total: number of its parts, if known.
    """

    monitor_interval = 0  # no thread beside the work

    def __init__(self, what: str, *, total: int | None = None, **options: Any) -> None:
        self.on_terminal = sys.stdout.isatty()
        super().__init__(
            desc=what,
            total=total,
            file=sys.stdout if self.on_terminal else io.StringIO(),
            leave=False,
            dynamic_ncols=True,
            delay=SILENT if self.on_terminal else LINE_EVERY,
            mininterval=0.1 if self.on_terminal else LINE_EVERY,
            miniters=1,
            disable=distributed.is_initialized() and distributed.get_rank() > 0,
            **options,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or print the line; an empty `msg` removes a bar."""
        if self.on_terminal:
            return bool(super().display(msg, pos))
        if msg is None and self.n > 0:
            print(self.line(), flush=True)
        return True

    def line(self) -> str:
        """Return a line on what is done, and on the time left where it is known."""
        now = self.format_dict
        if self.total is None:
            return f"{self.desc}: {self.n:,} done"
        share = self.n / self.total
        left = now["elapsed"] * (self.total - self.n) / max(self.n - self.initial, 1)
        said = f"{self.desc}: {self.n:,} of {self.total:,} ({share:.0%})"
        more = "" if not self.postfix else f", {self.postfix}"
        return f"{said}, about {self.format_interval(left)} left{more}"


def with_progress(items: Iterable[Item], what: str, *, total: int | None = None) -> Iterator[Item]:
    """Yield the items, and show how many of them are done.

    Args:
        total: their number; None: what ``len`` says, if it says anything.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(what, total=total) as shown:
        for item in items:
            yield item
            shown.update()
