"""The web page: its parts fit together, it can be read by everybody, and it does what it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from served import Running

from plrhf.serving.app import PAGE

HTML, CSS, SCRIPT = ((PAGE / name).read_text() for name in ("index.html", "page.css", "page.js"))
TEXT_ON = (
    *(("--ink", "--page"), ("--ink", "--card"), ("--quiet", "--page"), ("--quiet", "--card")),
    *(
        ("--on-accent", "--accent"),
        ("--danger", "--card"),
        ("--ink", "--tint"),
        ("--quiet", "--tint"),
    ),
)
SHAPES_ON = (
    ("--line", "--card"),
    ("--accent", "--page"),
    ("--accent", "--card"),
    ("--dot", "--page"),
    ("--line", "--page"),
)


class Page(HTMLParser):
    """All tags of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(HTML)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_parts_fit_together() -> None:
    tags = Page().tags
    ids = [one["id"] for _, one in tags if "id" in one]
    assert len(set(ids)) == len(ids)
    asked = set(re.findall(r'element\("([\w-]+)"\)', SCRIPT)) - {
        "you",
        "trail",
    }  # which it draws itself
    assert asked <= set(ids)
    labelled = {one.get("for") for tag, one in tags if tag == "label"} | {"consent"}
    for tag, one in tags:
        if tag in ("input", "textarea", "progress", "meter"):
            assert one["id"] in labelled
        assert not {"style", "onclick"} & set(one), "no inline style or script passes the policy"
        for name in ("aria-labelledby",):
            assert name not in one or one[name] in ids
    assert "http" not in re.sub(r"http://www.w3.org/2000/svg", "", HTML + CSS + SCRIPT)
    assert "innerHTML" not in SCRIPT and "eval" not in SCRIPT


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast(theme: int) -> None:
    """WCAG 2 AA: 4.5 for text, 3 for shapes that say something."""
    colours = dict(re.findall(r"(--[\w-]+): (#\w{6})", CSS.split(":root {")[1 + theme]))
    for pairs, least in ((TEXT_ON, 4.5), (SHAPES_ON, 3.0)):
        for front, back in pairs:
            high, low = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= least, (front, back)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_a_visit(server: Running) -> None:
    """Choices by keyboard, one taken back, a text written and judged, data downloaded, all deleted."""
    with server.client() as http:
        page = http.get("/")
        policy_line = page.headers["content-security-policy"]
        assert page.text == HTML and "default-src 'none'" in policy_line
        assert "unsafe" not in policy_line
        assert http.get("/page/page.js").text == SCRIPT
        for path in ("/page/nothing", "/page/..%2Fapp.py", "/page/index.html"):
            assert http.get(path).status_code == 404
    driver = Path(__file__).with_name("page_driver.mjs")
    done = subprocess.run(
        ["node", str(driver), server.url, str(PAGE)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    check_visit(json.loads(done.stdout))


def check_visit(seen: dict[str, Any]) -> None:
    begun = seen["begun"]
    assert begun["start"] and not begun["questions"] and not begun["write"]
    assert begun["focused"] == "questions" and begun["people"] == 5 + 3
    assert len({tuple(one) for one in seen["prompts"][:5]}) == 5
    assert seen["after"]["count"] == 6 and seen["after"]["status"] == "You chose the left answer."
    assert 0 < seen["after"]["certainty"] < 1 and len(seen["after"]["place"]) == 2
    own, generic = seen["written"]
    assert own and generic and (own == generic or seen["judged"].startswith("Thank you"))
    verdicts = [pair["verdict"] for pair in seen["stored"]]
    assert verdicts[:6] == ["prefer", "prefer", "tie", "skip", "prefer", "prefer"]
    for (_, left), pair, side in zip(
        seen["prompts"], seen["stored"], ("chosen", "rejected"), strict=False
    ):
        assert pair[side] == left  # the first answer was the left one, the second the right one
    assert seen["more"] == len(seen["stored"]) == (7 if own != generic else 6)
    assert seen["downloaded"] == "my-choices.json"
    assert seen["end"]["left"] == 404 and not seen["end"]["start"]
    assert seen["end"]["status"].startswith(f"Deleted: {len(seen['stored'])} choices")
    assert all(url.startswith("/v1/") for url in seen["urls"])
