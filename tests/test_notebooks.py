"""A notebook is its source, executed: the .py is written by hand, the .ipynb by a command."""

import ast
import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

import minillm

PACKAGE = Path(minillm.__file__).resolve().parent
NOTEBOOKS = PACKAGE.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))
ADVICE = "run `make notebooks` and commit the result"

each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def cells(notebook):
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


def test_every_notebook_has_a_source():
    assert [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == [
        path.stem for path in SOURCES], ADVICE


@each_notebook
def test_the_notebook_is_its_source_executed(source):
    executed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert cells(executed) == cells(jupytext.read(source)), ADVICE
    counts = [cell.execution_count for cell in executed.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), f"not from top to bottom; {ADVICE}"


@each_notebook
def test_the_figures_are_in_the_notebook(source):
    executed = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    kinds = {kind for cell in executed.cells if cell.cell_type == "code"
             for output in cell.outputs for kind in output.get("data", {})}
    assert "image/png" in kinds, ADVICE


@each_notebook
def test_the_notebook_runs(source, monkeypatch):
    """From top to bottom in a fresh kernel, with sizes shrunk; an exception fails."""
    monkeypatch.setenv("MINILLM_FAST", "1")
    notebook = jupytext.read(source)
    NotebookClient(notebook, timeout=300, kernel_name="python3",
                   resources={"metadata": {"path": str(NOTEBOOKS)}}).execute(env=dict(os.environ))


def defined_names(nodes):
    return {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@each_notebook
def test_no_notebook_defines_what_the_package_has(source):
    """Code is shown by inspect.getsource: a copy would drift."""
    taken = {name for path in PACKAGE.glob("*.py")
             for name in defined_names(ast.parse(path.read_text(encoding="utf-8")).body)}
    assert "attention_np" in taken
    assert not taken & defined_names(ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
