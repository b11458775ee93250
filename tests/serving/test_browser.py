"""Visits the page in Chromium by benchmarks/browser.py, where Playwright and Chromium are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from served import serving

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "browser.py"


@pytest.mark.long
@pytest.mark.skipif(find_spec("playwright") is None, reason="playwright is not installed")
def test_visits_in_chromium(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Ten pairs by keyboard, a text, a download, deletion: no fault on a phone, nor in the dark.

    CHROMIUM names the browser where it is not on the path, AXE a file axe.min.js of axe-core.
    """
    browser = os.environ.get("CHROMIUM", shutil.which("chromium"))
    if browser is None:
        pytest.skip("chromium is not installed")
    words = [f"--chromium={browser}", f"--out={tmp_path}", "--widths=390"]
    if "AXE" in os.environ:
        words.append(f"--axe={os.environ['AXE']}")
    with serving(runs[0], tmp_path, "pool=20", "max_tokens=30", reward=runs[1]) as server:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), server.url, *words],
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 visits, 0 faults" in done.stdout
