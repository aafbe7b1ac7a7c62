"""docs/notebook: it runs as committed, and prints what its committed outputs say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flowbp_ray.surrogate import METHODS
from tests.paths import ROOT

NOTEBOOK = ROOT / "docs" / "notebook" / "surrogate.ipynb"
CODE = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def printed(cells: list[dict]) -> str:
    """What code cells print, by their stored outputs."""
    return "".join("".join(o["text"]) for cell in cells for o in cell["outputs"] if o["output_type"] == "stream")


def check_same(now: str, then: str) -> None:
    """The same words, and numbers that differ by no more than other kernels may round a short training."""
    number = r"-?\d+(?:\.\d+)?"
    assert re.sub(rf"{number}|\s+", " ", now).split() == re.sub(rf"{number}|\s+", " ", then).split()
    values = [[float(n) for n in re.findall(number, text)] for text in (now, then)]
    assert np.allclose(*values, rtol=0.15, atol=0.06)


def test_it_has_been_run_and_shows_its_pictures() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    pictures = [o for cell in CODE for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert len(pictures) == 4 and NOTEBOOK.stat().st_size < 500_000
    assert all(len(re.findall(rf"^{name} ", printed(CODE), re.MULTILINE)) == 2 for name in METHODS)


@pytest.mark.slow
def test_its_cells_run_and_print_what_is_committed(tmp_path: Path) -> None:
    program = "\n".join("".join(cell["source"]).removesuffix(";") for cell in CODE)
    (tmp_path / "cells.py").write_text(program)
    settings = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "cells.py"], cwd=tmp_path, env=os.environ | settings, capture_output=True,
                         text=True)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    check_same(ran.stdout, printed(CODE))


@pytest.mark.long
def test_it_runs_in_a_kernel() -> None:
    """In Jupyter's own, with its display of pictures, where the extra `notebook` is installed."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    ran = nbclient.NotebookClient(nbformat.read(NOTEBOOK, 4), timeout=300, kernel_name="python3").execute()
    cells = [cell for cell in ran.cells if cell.cell_type == "code"]
    check_same(printed(cells), printed(CODE))
    assert sum("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs) == 4
