"""Writes sections as a self-contained HTML page: inline styles, no script, every value escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from plrhf.evaluation.records import write_text
from plrhf.reporting.drawing import Drawing
from plrhf.reporting.tables import Table


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
    """Write a page of the lead and the sections that are not None, and return its path."""
    there = [section for section in sections if section is not None]
    words = {"title": title, "subtitle": subtitle, "sections": there, "lead": lead}
    write_text(path, _template("report.html.j2").render(words))
    return path


@cache
def _template(name: str) -> Any:
    """Load a template of this folder."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
