"""Notebooks run from a small run, hold no logic, and keep outputs that are small."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from runs import ENVIRONMENT, ROOT
from test_report_parts import ADAPTED

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LOGIC = (ast.FunctionDef, ast.ClassDef, ast.If, ast.For, ast.While, ast.comprehension, ast.Lambda)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def test_the_three_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["ablation", "new_users", "users"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_small_outputs_and_no_logic(path: Path) -> None:
    """Tables and plots of one's own are kept; a report's sections are large, and made when it runs."""
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < 30_000
    assert any(len(cell.outputs) > 0 for cell in code_cells(path))
    for cell in code_cells(path):
        assert cell.execution_count is None
        assert [one for one in cell.outputs if one.get("name") == "stderr"] == []
        found = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, LOGIC)]
        assert found == []


SHOWN = {
    "ablation": ["Test results", "How they were made"],
    "new_users": ["Test results", "New users"],
    "users": ["Test results", "Accuracy by user", "User model", "Soft prompts in words"],
}


@pytest.mark.long
@pytest.mark.slow
def test_executed_from_small_runs(policy_run: Path, reward_run: Path, tmp_path: Path) -> None:
    """All by one process, for its start takes longer than they do; each without the others' names."""
    for run, source in (("policy", policy_run), ("reward", reward_run)):
        shutil.copytree(source, tmp_path / run, ignore=shutil.ignore_patterns("checkpoints"))
    results = json.loads((tmp_path / "policy" / "results.json").read_text())
    of_the_run = {**ADAPTED, "fingerprint": results["provenance"]["fingerprint"]}
    (tmp_path / "policy" / "adapt.json").write_text(json.dumps(of_the_run))
    books = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
    together = nbformat.v4.new_notebook(metadata=books["users"].metadata)
    for book in books.values():
        (settings,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
        settings.source = (
            "RUNS, OUT, RUN, REWARD = '[pr]*', 'out', 'policy', 'reward'\n"
            "ONE, OTHER = 'reward', 'policy'"
        )
        together.cells += [nbformat.v4.new_code_cell("%reset -f"), *book.cells]
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(together, timeout=300, resources=resources).execute(env=ENVIRONMENT)
    for name, book in books.items():
        outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
        pages = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
        assert [title for title in SHOWN[name] if f"<h2>{title}</h2>" not in pages] == [], name
