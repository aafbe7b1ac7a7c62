"""A suite of three rows and three seeds, and its runs as if they had ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowbp_ray.comparing.results import Comparison, collect
from flowbp_ray.comparing.suite import Cell, Suite, cells, read
from flowbp_ray.run.folder import Run
from tests.small import small_overrides

SUITE = """
name: three
config: shapes_flowbp_sparse
overrides: [OVERRIDES]
seeds: [1, 2, 3]
rows:
  one: {}
  "K = 2, late": {overrides: [method.k=2]}
  other: {config: shapes_refl, overrides: [method.last=3]}
columns: [verifier, score]
"""


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    small = [*small_overrides(tmp_path), "evaluation.prompts=shapes:dev", "evaluation.limit=4"]
    file = tmp_path / "suite.yaml"
    file.write_text(SUITE.replace("OVERRIDES", ", ".join(f"'{o}'" for o in small)))
    return read(str(file))


def ended(cell: Cell, verifier: float, score: float) -> None:
    """The folder of a run that has ended, made by hand: evaluated before and after two steps."""
    run = Run.create(cell.load())
    assert run.folder == cell.folder
    before = {"verifier": {"mean": 0.25}, "score": {"mean": 1.0}}
    after = {"verifier": {"mean": verifier}, "score": {"mean": score}}
    part = {"before": before, "after": after, "change": {}}
    summary = {"guidance": {"1": part}, "steps": 2, "seconds": 10.0, "weights_sha256": "x"}
    (run.folder / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": s, "kind": "evaluation", "guidance": 1.0, "verifier": v} for s, v in ((0, 0.25), (2, verifier))]
    lines += [{"step": s, "kind": "train", "step_s": 1800.0} for s in range(2)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


VALUES = {
    "one": [(0.50, 3.0), (0.60, 3.5), (0.55, 3.1)],
    "K = 2, late": [(0.40, 3.1), (0.50, 3.6), (0.45, 3.2)],  # below `one` by 0.1 with every seed, though they overlap
    "other": [(0.52, 0.0), (0.58, 0.1), (0.56, 0.2)],
}


def collected(suite: Suite, tmp_path: Path, seeds: int = 3) -> tuple[Comparison, list[Cell]]:
    found = cells(suite, tmp_path / "out")
    for cell in found:
        if cell.seed <= seeds:
            ended(cell, *VALUES[cell.row][cell.seed - 1])
    return collect(suite, found), found
