"""Which wing may import which, as docs/architecture.md draws it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import plrhf

PACKAGE = Path(plrhf.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PICTURE = PACKAGE.parent / "docs" / "architecture.md"

# From the top; a wing imports from lower rows and from itself.
FLOORS = (
    ("cli",),
    ("referee",),
    ("reporting", "serving"),
    ("evaluation", "training"),
    ("models",),
    ("aggregators",),
    ("backbone", "encoders", "data"),
    ("core",),
)
FLOOR_OF = {wing: len(FLOORS) - row for row, wings in enumerate(FLOORS) for wing in wings}


def wing_of(path: Path) -> str:
    """The folder of the package that a file is in."""
    return path.relative_to(PACKAGE).parts[0]


def imported(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def wings_imported(path: Path) -> set[str]:
    """Other wings that a file imports from."""
    parts = [name.split(".") for name in imported(path)]
    wings = {part[1] for part in parts if part[0] == "plrhf" and len(part) > 1}
    return (wings & set(FLOOR_OF)) - {wing_of(path)}


def test_every_module_is_in_a_wing() -> None:
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]
    assert {wing_of(path) for path in FILES} - {"__init__.py"} <= set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_lower_wings_alone(path: Path) -> None:
    if path == PACKAGE / "__init__.py" or path.name == "__main__.py":  # a command, as train.py is
        return
    for other in wings_imported(path):
        assert FLOOR_OF[other] < FLOOR_OF[wing_of(path)], f"{path} imports plrhf.{other}"


def test_the_picture_shows_these_floors() -> None:
    """docs/architecture.md draws one row a floor, from the top."""
    drawing = PICTURE.read_text().split("<!-- floors -->")[1].split("<!-- /floors -->")[0]
    rows = [tuple(re.findall(r"\[(\w+)\]", line)) for line in drawing.splitlines() if "[" in line]
    assert [set(row) for row in rows] == [set(floor) for floor in FLOORS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, its docstring left out."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return 0 if len(body) == 0 else (body[-1].end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_is_long(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert lines_of_code(node) <= 50, f"{path}:{node.lineno} {node.name}"


def test_every_wing_says_what_it_is_for() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "wings"),
    [
        ("transformers", {"backbone"}),
        ("peft", {"backbone"}),
        ("deepspeed", {"backbone", "training"}),
        ("hydra", {"cli"}),
        ("omegaconf", {"cli"}),
    ],
)
def test_a_library_is_imported_where_it_belongs(library: str, wings: set[str]) -> None:
    importers = {
        wing_of(path)
        for path in FILES
        if any(name.split(".")[0] == library for name in imported(path))
    }
    assert importers <= wings


def test_no_two_test_modules_have_one_name() -> None:
    """Test folders are no packages, so pytest takes two modules of one name for the same."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.slow
def test_lower_wings_load_no_heavy_library() -> None:
    """Nor do the modules that read the command line, which set how libraries load."""
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in FILES
        if wing_of(path) in ("core", "encoders")
    ] + ["plrhf.cli.commands"]
    code = f"""
import sys
import {", ".join(modules)}
print(*({{"transformers", "peft", "deepspeed", "lightning", "datasets"}} & sys.modules.keys()))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []
