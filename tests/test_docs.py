"""The documentation site: no dead link, nothing from another host, every setting explained."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ENVIRONMENT

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.slow
def test_the_site_is_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        env={**ENVIRONMENT, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert {path.stem for path in pages} >= {"first_model", "many_gpus"}
    assert {path.stem for path in pages} >= {"index", "settings", "api", "architecture", "referee"}
    elsewhere = re.compile(r"""(?:<script|<link|<img|<iframe)[^>]*(?:src|href)=["']?https?:""")
    for page in pages:
        for tag in elsewhere.findall(page.read_text()):
            assert 'rel="canonical"' in tag, (page.name, tag)
    text = (tmp_path / "site" / "settings.html").read_text()
    for name in ("optim.user_lr", "data.split_by", "eval.against", "encoder.rank", "keys"):
        assert f"<code>{name}</code>" in text or f"<code>{name}." in text, name
    assert os.path.getsize(tmp_path / "site" / "api.html") > 50_000
