"""Opens pages of a folder in Chromium, on three widths, light and dark: the docs' site, reports.

    make docs
    python benchmarks/pages.py build/site --axe package/axe.min.js
    python benchmarks/pages.py runs/quickstart --axe package/axe.min.js

(`benchmarks/browser.py` says how to install what it needs.) The script fails on an error of the console, a
request to another host, a violation that axe-core finds, a page wider than its window, or a cut table that
cannot be scrolled.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from browser import THEMES, WIDTHS, Visit
from playwright.sync_api import Browser, sync_playwright

CUT = """() => [...document.querySelectorAll("table")].filter((table) => {
    for (let one = table; one !== document.body && one !== null; one = one.parentElement) {
        if (one.scrollWidth <= one.clientWidth + 1) continue;
        const how = getComputedStyle(one).overflowX;
        if (how === "auto" || how === "scroll") return false;
        if (how === "hidden" || how === "clip") return true;
    }
    return false;
}).map((table) => table.innerText.slice(0, 60))"""
"""Texts of the tables of which a part is out of sight and out of reach."""


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def visit_page(browser: Browser, url: str, name: str, axe: str | None, out: Path) -> list[str]:
    """Open a page in each width and theme; return what is wrong with it."""
    faults: list[str] = []
    for width in WIDTHS:
        for theme in THEMES:
            context = browser.new_context(
                viewport={"width": width, "height": 844}, color_scheme=theme
            )
            context.set_default_timeout(120_000)  # ms: of a busy machine
            visit = Visit(context.new_page(), url, f"{name}-{width}-{theme}", axe, out)
            visit.watch()
            visit.page.goto(f"{url}/{name}", wait_until="load")
            for text in visit.page.evaluate(CUT):
                visit.fault(f"a table is cut: {text!r}")
            visit.name = visit.name.replace("/", "_")
            visit.stage("page")
            faults += visit.faults
            context.close()
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--axe", type=Path, help="axe.min.js; without it axe is left out")
    parser.add_argument("--chromium", help="a Chromium that is installed; else Playwright's own")
    parser.add_argument("--only", nargs="+", help="pages; else all")
    parser.add_argument("--out", type=Path, default=Path("shots"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    axe = None if given.axe is None else given.axe.read_text()
    names = given.only or sorted(
        str(path.relative_to(given.folder)) for path in given.folder.rglob("*.html")
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(given.folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, faults = f"http://127.0.0.1:{server.server_port}", []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=given.chromium, args=["--no-sandbox"], env=dict(os.environ)
        )
        for name in names:
            found = visit_page(browser, url, name, axe, given.out)
            print("\n".join([f"{name}: {len(found)} faults", *found]), flush=True)
            faults += found
        browser.close()
    print(
        f"{len(names)} pages, {len(names) * len(WIDTHS) * len(THEMES)} visits, {len(faults)} faults"
    )
    sys.exit(len(faults) > 0)


if __name__ == "__main__":
    main()
