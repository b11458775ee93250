"""What `pip install` puts elsewhere is whole: every module, template and setting, both commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked wheel of the package."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("plrhf", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-c", BUILD, str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=300)
    (packed,) = out.glob("*.whl")
    zipfile.ZipFile(packed).extractall(out)
    return out


def files(folder: Path) -> set[Path]:
    return {
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.slow
def test_nothing_is_left_out(wheel: Path) -> None:
    conf = {Path("conf", path) for path in files(ROOT / "conf")}
    assert len(conf) > 30
    assert files(wheel / "plrhf") == files(ROOT / "plrhf") | conf


@pytest.mark.slow
def test_its_commands_find_their_settings(wheel: Path, tmp_path: Path) -> None:
    (info,) = wheel.glob("*.dist-info")
    lines = (info / "entry_points.txt").read_text().split("\n")
    commands = dict(line.split(" = ") for line in lines if " = " in line)
    assert commands.keys() == {"plrhf"}
    for name, value in commands.items():
        assert callable(EntryPoint(name, value, "console_scripts").load())
    asked = "from plrhf.cli.commands import CONF, plrhf; print(CONF); plrhf()"
    done = subprocess.run(
        [sys.executable, "-c", asked, "train", "encoder=nobody"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == str(wheel / "plrhf" / "conf")
    assert "encoder='nobody' is not allowed: expected one of cluster, context" in done.stderr
