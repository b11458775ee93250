"""Matplotlib figures as inline SVG in the colours (light, dark, print) and fonts of the page."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from io import StringIO
from typing import Any, NamedTuple

from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from plrhf.core.errors import visible

# Placeholder colours. `drawing` replaces each by the page's CSS variable for its role.
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
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "plrhf",
}


class Drawing(NamedTuple):
    """A figure as inline SVG."""

    svg: Markup
    caption: str = ""
    wide: bool = False


def panel(width: float = 4.7, height: float = 3.0) -> tuple[Figure, Axes]:
    """Make an empty figure, sizes in inches. Two of the default width fit side by side on a page."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def drawing(figure: Figure, label: str, *, caption: str = "", wide: bool = False) -> Drawing:
    """Convert a figure to inline SVG with the page's colours and fonts.

    Args:
        label: describes the figure to screen readers. It is also put in front of all ids, so it must
            be unique on the page.
        wide: whether the figure takes the whole width of the page.
    """
    buffer = StringIO()
    with warnings.catch_warnings():  # of glyphs that its own fonts lack; the page has the browser's
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})  # savefig draws twice
    svg = visible(buffer.getvalue())
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
    """Add a text to each mark of a scatter plot, shown when the mouse points at the mark.

    Args:
        marks: the ``gid`` of the scatter plot. words: a text for each of its marks.

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
        return f"<use {use[1]}><title>{escape(visible(next(spoken)))}</title></use>"

    block = re.sub(r"<use ([^>]*?)/>", titled, block)
    return made._replace(svg=Markup(svg[: start.end()] + block + svg[end:]))
