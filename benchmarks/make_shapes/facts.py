"""What the model card says about a training run, kept beside its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path


def record(work: Path, stage: str, **facts: float) -> None:
    """Keep the facts of a finished stage in work/<stage>.json."""
    (work / f"{stage}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def recall(work: Path, stage: str) -> dict[str, float]:
    """The facts of a stage; an error that names the command to run if it has not finished."""
    file = work / f"{stage}.json"
    if not file.exists():
        raise ValueError(f"{file} is missing: run `python -m benchmarks.make_shapes {stage} --work {work}` first")
    return dict(json.loads(file.read_text(encoding="utf-8")))
