"""The notebooks run from their first cell to their last, in a kernel of their own."""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SECONDS_A_CELL = 240


def environment(folder: str) -> dict[str, str]:
    """Variables of the kernel: the CPU, this checkout, the tests' compiled programs, and nothing of
    the user's own Jupyter. Its programs are optimized, since they compute for longer than they take
    to compile."""
    return os.environ | {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "IPYTHONDIR": folder,
        "JUPYTER_CONFIG_DIR": folder,
        "JUPYTER_DATA_DIR": folder,
        "JUPYTER_RUNTIME_DIR": folder,
    }


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the kernel runs; its path is short, since sockets are in it."""
    with tempfile.TemporaryDirectory() as name:
        for variable, value in environment(name).items():
            monkeypatch.setenv(variable, value)
        yield name


def run(name: str, folder: str) -> NotebookNode:
    """Run a notebook as it is committed.

    Raises:
      CellExecutionError: a cell failed; the message has its code and the traceback.
    """
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": folder}}
    client = NotebookClient(notebook, timeout=SECONDS_A_CELL, resources=resources)
    manager = client.create_kernel_manager()
    manager.transport, manager.ip = "ipc", f"{folder}/ipc"  # a port may be taken before it is bound
    return client.execute()


def outputs(notebook: NotebookNode) -> list[dict[str, Any]]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook: NotebookNode) -> str:
    return "".join(output["text"] for output in outputs(notebook) if output.get("name") == "stdout")


@pytest.mark.model
def test_colab(folder: str):
    notebook = run("colab", folder)
    text = printed(notebook)
    assert "The capital of France is Paris." in text
    assert "completed: 4" in text
    assert re.search(r"^4 hand-offs: [\d.]+ MB in \d+ shipments$", text, re.MULTILINE)
    pictures = {
        cell.id: [output for output in cell.outputs if "image/png" in output.get("data", {})]
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert {name for name, found in pictures.items() if found} == {"timeline", "handoff"}


def test_train(folder: str):
    text = printed(run("train", folder))
    assert "step 150: loss 0." in text
    assert "3 of 3 answers have the tokens of the trained model" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs_and_with_short_cells(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert outputs(notebook) == []
    for cell in notebook.cells:
        assert cell.get("execution_count") is None
        assert len(cell.source.splitlines()) <= 40, cell.id
