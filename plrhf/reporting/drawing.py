"""Matplotlib figures as inline SVG that follows the page: its colours (light, dark, print), its fonts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO
from typing import Any, NamedTuple

from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Placeholders, one a role: `drawing` turns each into the page's CSS variable of that name.
INK, MUTED, GRID, ACCENT, WARM = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = (ACCENT, WARM, *(f"#0{number}0{number}0{number}" for number in "6789ab"))
ROLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", WARM: "warm"}
ROLES |= {colour: f"series-{place}" for place, colour in enumerate(SERIES) if place > 1}
KIND_COLOURS = {"seen": ACCENT, "unseen": WARM}
KIND_MARKERS = {"seen": "o", "unseen": "D"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a run may be called $x$
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "plrhf",
}


class Drawing(NamedTuple):
    """An inline figure."""

    svg: Markup
    caption: str = ""
    wide: bool = False


def panel(width: float = 4.7, height: float = 3.0) -> tuple[Figure, Axes]:
    """An empty panel, in inches; two of the default width stand side by side on a page."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def drawing(figure: Figure, label: str, *, caption: str = "", wide: bool = False) -> Drawing:
    """The figure as inline SVG with the page's colours and fonts, ids made its own by the label."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height|version|xmlns|xmlns:xlink)="[^"]*"', "", svg, count=5)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for placeholder, role in ROLES.items():
        svg = svg.replace(placeholder, f"var(--{role})")
    prefix = re.sub(r"\W+", "-", label.lower())
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return Drawing(Markup(svg), caption, wide)  # matplotlib escapes what it writes


def with_hover(made: Drawing, marks: str, words: Sequence[str]) -> Drawing:
    """The drawing in which each mark of the scatter of gid `marks` shows its words when pointed at.

    Raises:
        RuntimeError: matplotlib drew another number of marks than there are words.
    """
    svg = str(made.svg)
    start = re.search(rf'<g id="[\w-]*-{re.escape(marks)}">', svg)
    if start is None:
        raise RuntimeError(f"no marks {marks} in the figure")
    end = svg.find('<g id="', start.end())
    block = svg[start.end() : end]
    if block.count("<use ") != len(words):
        raise RuntimeError(f"{block.count('<use ')} marks drawn for {len(words)} words")
    spoken = iter(words)

    def titled(use: re.Match[str]) -> str:
        return f"<use {use[1]}><title>{escape(next(spoken))}</title></use>"

    block = re.sub(r"<use ([^>]*?)/>", titled, block)
    return made._replace(svg=Markup(svg[: start.end()] + block + svg[end:]))
