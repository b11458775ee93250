"""Writes sections as a self-contained HTML page: inline styles, no script, every value escaped."""

from __future__ import annotations

import contextlib
import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from plrhf.core.errors import visible
from plrhf.evaluation.records import write_text
from plrhf.reporting.drawing import Drawing
from plrhf.reporting.tables import Table

BACK = re.compile(r"<!-- back -->(.*?)<!-- /back -->", re.DOTALL)
"""The part of a page that links to the comparisons which show its run."""


@dataclass(frozen=True)
class Section:
    """A part of a page. Notebooks show it as pages do. A folded table opens at a click."""

    title: str
    note: str = ""
    warnings: Sequence[str] = ()
    table: Table | None = None
    folded: bool = False
    figures: Sequence[Drawing] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    text_name: str = ""
    text: str = ""

    @property
    def anchor(self) -> str:
        """The id that links to this section use."""
        return re.sub(r"\W+", "-", self.title.lower())

    def _repr_html_(self) -> str:
        return _template("fragment.html.j2").render(section=self)


@dataclass(frozen=True)
class Lead:
    """The first screen of a page: what its numbers say, and a picture."""

    sentences: Sequence[str]
    figure: Drawing


def write_page(
    path: Path,
    title: str,
    subtitle: str,
    sections: Sequence[Section | None],
    lead: Lead | None = None,
) -> Path:
    """Write a page of the lead and the sections that are not None, and return its path.

    It keeps the links of an older page to comparisons, see `link_back`.
    """
    there = [section for section in sections if section is not None]
    older = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    words = {"title": title, "subtitle": subtitle, "sections": there, "lead": lead}
    words["back"] = _back(path, _linked(path, older))
    write_text(path, _template("report.html.j2").render(words))
    return path


def address(page: Path, seen_from: Path) -> str:
    """Return the relative address of a page, as a link in another page has it."""
    return quote(Path(os.path.relpath(page, seen_from.parent)).as_posix())


def link_back(path: Path, comparison: Path) -> None:
    """Add a link to a comparison to the page of one of its runs, if that can be written."""
    if not path.is_file():  # a pipe would be waited for
        return
    with contextlib.suppress(OSError, UnicodeError):
        text = path.read_text(encoding="utf-8")
        links = list(dict.fromkeys([*_linked(path, text), address(comparison, path)]))
        new = BACK.sub(lambda _: str(_back(path, links)), text, count=1)
        if new != text:
            write_text(path, new)


def _linked(path: Path, text: str) -> list[str]:
    """Return the addresses in a page's text of comparisons that are still there, and nothing else."""
    found = BACK.search(text)
    links = [] if found is None else re.findall(r'href="([^"]*)"', found[1])
    addresses = [html.unescape(one) for one in links]
    relative = [one for one in addresses if one == quote(unquote(one)) and not one.startswith("/")]
    return [one for one in relative if (path.parent / unquote(one)).is_file()]


def _back(path: Path, addresses: Sequence[str]) -> Markup:
    """Return the part of a page that links to comparisons, which are named by their folders."""
    links = [
        Markup('<a href="{}">{}</a>').format(
            one, visible((path.parent / unquote(one)).resolve().parent.name)
        )
        for one in addresses
    ]
    shown = Markup('<p class="muted">Compared with other runs: {}</p>').format(
        Markup(", ").join(links)
    )
    return Markup("<!-- back -->{}<!-- /back -->").format(shown if len(links) > 0 else "")


def _finalized(value: Any) -> Any:
    """Return what a template shows of a value; markup is our own."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _template(name: str) -> Any:
    """Load a template of this folder."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_finalized,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
