"""Visits the page of a running server in Chromium, as a person does, on three widths, light and dark.

    pip install playwright && npm pack axe-core && tar xzf axe-core-*.tgz
    python benchmarks/browser.py http://127.0.0.1:8000 --axe package/axe.min.js --out shots

Each visit answers ten pairs by keyboard, writes a text, marks the better one, downloads the data and
deletes the person. The script fails on an error of the console, a request to another host, a violation that
axe-core finds, or a page wider than its window. Screenshots of each stage go to the folder of ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

WIDTHS = (390, 800, 1280)
THEMES = ("light", "dark")
KEYS = ("ArrowLeft", "ArrowRight", "t", "s", "u", *("ArrowLeft", "ArrowRight") * 3, "ArrowLeft")
"""Ten choices stand at the end: nine preferences and a tie; a skip was taken back."""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
AXE = "() => axe.run(document, {resultTypes: ['violations']}).then((found) => found.violations)"
SECONDS = 20


@dataclass
class Visit:
    """One person's visit.

    Attributes:
        faults: what was wrong. waits: seconds from an answer to the next pair.
    """

    page: Page
    url: str
    name: str
    axe: str | None
    out: Path
    faults: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def watch(self) -> None:
        """Note errors of the console and requests to other hosts from now on."""
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.fault(f"script: {error}"))
        self.page.on("request", self.see)

    def hear(self, message: Any) -> None:
        if message.type == "error":
            self.fault(message.text)

    def see(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", f"blob:{self.url}")):
            self.fault(f"request to {request.url}")

    def fault(self, words: str) -> None:
        self.faults.append(f"{self.name}: {words}")

    def stage(self, name: str) -> None:
        """Take a screenshot, and check what can be checked at any time."""
        self.page.screenshot(path=self.out / f"{self.name}-{name}.png", full_page=True)
        if self.page.evaluate(OVERFLOW) > 0:
            self.fault(f"{name}: wider than its window")
        if self.axe is None:
            return
        self.page.evaluate(self.axe)
        for one in self.page.evaluate(AXE):
            where = ", ".join(node["html"][:80] for node in one["nodes"])
            self.fault(f"{name}: axe {one['id']} ({one['impact']}): {where}")

    def text(self, place: str) -> str:
        return self.page.locator(place).inner_text()


def begin(visit: Visit) -> None:
    page = visit.page
    page.goto(visit.url)
    visit.stage("1-start")
    page.keyboard.press("Tab")
    page.get_by_label("A name").fill(visit.name)
    page.get_by_label("Keep my choices").check()
    page.get_by_role("button", name="Begin").click()
    expect(page.locator("#left .text")).not_to_be_empty()
    visit.stage("2-first")


def answer(visit: Visit) -> None:
    page, count = visit.page, 0
    start = page.locator("#you").get_attribute("cx"), page.locator("#you").get_attribute("cy")
    for key in KEYS:
        count += -1 if key == "u" else 1
        before = time.perf_counter()
        page.keyboard.press(key)
        expect(page.locator("#count")).to_have_text(str(count))
        expect(page.locator("body[aria-busy]")).to_have_count(0)
        visit.waits.append(time.perf_counter() - before)
    end = page.locator("#you").get_attribute("cx"), page.locator("#you").get_attribute("cy")
    if start == end:
        visit.fault("the person did not move on the map")
    if page.locator("#progress").get_attribute("value") != "10":
        visit.fault("progress is not at ten")
    if not visit.text("#certainty-words").endswith("%"):
        visit.fault(f"certainty says {visit.text('#certainty-words')}")
    visit.stage("3-ten")


def read(visit: Visit) -> None:
    page = visit.page
    page.get_by_label("Your question").fill("Write a note about the harbour.")
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("Both answers", timeout=1000 * SECONDS)
    visit.stage("4-written")
    if not visit.text("#own") or not visit.text("#generic"):
        visit.fault("an answer is empty")
    if page.locator("#own-better").is_enabled():
        page.locator("#own-better").click()
        expect(page.locator("#count")).to_have_text("11")


def leave(visit: Visit) -> None:
    page = visit.page
    with page.expect_download() as started:
        page.get_by_role("button", name="Download").click()
    stored = json.loads(Path(started.value.path()).read_text())
    if stored["id"] != visit.name or len(stored["pairs"]) < 10:
        visit.fault("the download is not the person's")
    page.get_by_role("button", name="Delete me").click()
    visit.stage("5-sure")
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("status")).to_contain_text("Deleted")
    visit.stage("6-gone")
    if page.request.get(f"{visit.url}/v1/users/{visit.name}").status != 404:
        visit.fault("the person is still there")


def visit_page(
    browser: Browser, url: str, width: int, theme: Any, axe: str | None, out: Path
) -> Visit:
    """Make one visit from beginning to end; what went wrong is in its faults."""
    phone = width < 500
    context = browser.new_context(
        viewport={"width": width, "height": 844},
        color_scheme=theme,
        is_mobile=phone,
        has_touch=phone,
    )
    context.set_default_timeout(1000 * SECONDS)
    visit = Visit(context.new_page(), url, f"visit-{width}-{theme}", axe, out)
    visit.watch()
    steps: tuple[Callable[[Visit], None], ...] = (begin, answer, read, leave)
    try:
        for step in steps:
            step(visit)
    except Exception as error:  # of Playwright: what was awaited did not come
        visit.fault(f"{step.__name__}: {str(error).splitlines()[0]}")
        visit.page.screenshot(path=out / f"{visit.name}-failed.png", full_page=True)
    context.close()
    return visit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument(
        "--axe", type=Path, help="axe.min.js of axe-core; without it axe is left out"
    )
    parser.add_argument("--chromium", help="a Chromium that is installed; else Playwright's own")
    parser.add_argument("--out", type=Path, default=Path("shots"))
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--themes", nargs="+", choices=THEMES, default=THEMES)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    axe = None if given.axe is None else given.axe.read_text()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=given.chromium, args=["--no-sandbox"], env=dict(os.environ)
        )
        visits = [
            visit_page(browser, given.url.rstrip("/"), width, theme, axe, given.out)
            for width in given.widths
            for theme in given.themes
        ]
        browser.close()
    waits = sorted(wait for visit in visits for wait in visit.waits)
    faults = [fault for visit in visits for fault in visit.faults]
    print("\n".join(faults))
    if len(waits) > 0:
        middle, most = waits[len(waits) // 2], waits[int(0.95 * len(waits))]
        print(f"answer to next pair: median {middle:.2f} s, p95 {most:.2f} s")
    print(f"{len(visits)} visits, {len(faults)} faults")
    sys.exit(len(faults) > 0)


if __name__ == "__main__":
    main()
