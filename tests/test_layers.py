"""Who may import whom: lower layers and one's own folder, and a short list beyond that."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import plrhf

ROOT = Path(plrhf.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LAYERS = (
    "config errors filling logprobs losses stats types",
    "aggregators backbone data encoders export gptj lora metrics optim probes training zero",
    "personal policy reward sft",
    "adapt cli comparison drawing endpoint evaluate figures finished generate jobs judges page plan "
    "report run seeds serve shots supervised sweeps tables tasks usermap users",
)
LAYER_OF = {unit: number for number, units in enumerate(LAYERS) for unit in units.split()}

SAME_LAYER = {
    # How errors look and what batches hold: under everything.
    "config": {"errors"},
    "filling": {"types"},
    "logprobs": {"types"},
    "losses": {"errors"},
    "stats": {"errors"},
    # The backbone's fast paths.
    "backbone": {"gptj", "lora", "zero"},
    "gptj": {"lora"},
    # The aggregator owns the backbone call; an export writes and reads all parts.
    "aggregators": {"backbone"},
    "export": {"aggregators", "backbone", "data", "encoders", "zero"},
    # What is open to fit; what of the rows gives choices away.
    "probes": {"data"},
    "training": {"data", "zero"},
    # What both models share.
    "policy": {"personal"},
    "reward": {"personal"},
    # What a page shows, and what it is made from.
    "comparison": {"finished", "tables"},
    "figures": {"drawing", "finished", "tables"},
    "page": {"drawing", "tables"},
    "report": {"comparison", "figures", "finished", "page", "seeds", "sweeps", "tables", "usermap"},
    "seeds": {"comparison", "finished", "sweeps", "tables"},
    "sweeps": {"drawing", "finished"},
    "usermap": {"drawing", "finished", "tables"},
    "users": {"evaluate"},
    # Entry points use what does the work.
    "cli": {"jobs"},
    "evaluate": {"generate"},
    "judges": {"endpoint", "evaluate"},
    "run": {"evaluate", "plan", "report", "supervised", "tables", "users"},
    "serve": {"adapt", "generate"},
    "shots": {"adapt"},
    "tables": {"finished"},
    "tasks": {"comparison", "evaluate", "jobs", "judges"} | {"report", "shots", "tables", "users"},
}

ONLY_IN = {"transformers": {"backbone"}, "peft": {"backbone"}, "deepspeed": {"zero"}}


def unit_of(path: Path) -> str:
    """A file of the package's root, or the folder that a file is in."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


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


def units_imported(path: Path) -> set[str]:
    """Other units of the package that a file imports from."""
    parts = [name.split(".") for name in imported(path)]
    units = {part[1] for part in parts if part[0] == "plrhf" and len(part) > 1}
    return {unit for unit in units if unit in LAYER_OF} - {unit_of(path)}


def test_every_file_has_a_layer() -> None:
    units = {unit_of(path) for path in FILES} - {"__init__"}
    assert units == set(LAYER_OF)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_lower_layers(path: Path) -> None:
    unit = unit_of(path)
    if unit == "__init__":
        assert imported(path) == set()
        return
    for other in units_imported(path):
        allowed = LAYER_OF[other] < LAYER_OF[unit] or other in SAME_LAYER.get(unit, ())
        assert allowed, f"{path.relative_to(ROOT)} imports plrhf.{other}"


def test_exceptions_are_used_and_go_round_in_no_circle() -> None:
    used: dict[str, set[str]] = {}
    for path in FILES:
        unit = unit_of(path)
        for other in units_imported(path):
            if LAYER_OF[other] == LAYER_OF[unit]:
                used.setdefault(unit, set()).add(other)
    assert used == SAME_LAYER
    TopologicalSorter(SAME_LAYER).prepare()  # raises CycleError


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_are_imported_in_one_place(library: str) -> None:
    importers = {
        unit_of(path)
        for path in FILES
        if any(name.split(".")[0] == library for name in imported(path))
    }
    assert importers <= ONLY_IN[library]


def test_packages_hand_names_on_and_do_nothing_else() -> None:
    for path in FILES:
        if path.name != "__init__.py":
            continue
        for node in ast.parse(path.read_text()).body:
            hands_on = isinstance(node, (ast.ImportFrom, ast.Assign, ast.Expr))
            assert hands_on, f"{path}:{node.lineno}"
            if isinstance(node, ast.Assign):
                assert ast.unparse(node.targets[0]) == "__all__"


def test_pure_parts_load_no_heavy_library() -> None:
    code = """
import sys
import plrhf.core.components, plrhf.data.rows, plrhf.encoders, plrhf.core.logprobs, plrhf.core.losses, plrhf.core.types
print(*({"transformers", "peft", "deepspeed", "lightning", "datasets"} & sys.modules.keys()))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []
