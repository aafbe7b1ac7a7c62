"""Writes metrics.jsonl, and sends the same numbers to wandb."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.observability import wandb_run
from flowbp_ray.observability.catalog import grouped
from flowbp_ray.utils.files import naming, write_atomically

Export = Callable[[int, str, Mapping[str, Any]], None]
"""Takes a line of metrics.jsonl: its step, its kind and its numbers."""


class Tracker:
    """Logs to metrics.jsonl a line per step, evaluation and judge; and to wandb, where `tracking.wandb` is on."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        export: Export | None = None,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        """folder: the run's. export: takes every line as well. say: prints a line that a person should know."""
        self.export = export
        self.path = folder / "metrics.jsonl"
        self.file = self.path.open("a", buffering=1)
        self.wandb: Any = None
        if config.tracking.wandb:
            run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            plain = config.model_dump(mode="json")
            self.wandb = wandb_run.start(folder, config.tracking.project, run_id, plain, say)

    def log(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Log a line. kind: train, evaluation or judge (which comes late). What is not finite is written as null.

        Raises OSError, which names the file, where the disk does not take it.
        """
        clean = {k: (None if isinstance(v, float) and not np.isfinite(v) else v) for k, v in values.items()}
        with naming(self.path):
            self.file.write(json.dumps({"step": step, "kind": kind, **clean}) + "\n")
        if self.export is not None:
            self.export(step, kind, clean)
        if self.wandb is not None:
            numbers = grouped(kind, clean)
            late = kind == "judge"  # wandb drops a step that is not the newest
            self.wandb.log({**numbers, "judge/step": step} if late else numbers, step=None if late else step)

    def rewind(self, step: int) -> None:
        """Remove the lines that were logged after the checkpoint of `step` (-1: all lines), and torn ones.

        The lines of judges are removed too: restored from the checkpoint, the judges write them again.
        """
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            before = entry["step"] < step or (entry["kind"] == "evaluation" and entry["step"] == step)
            if before and entry["kind"] != "judge":
                kept.append(line + "\n")
        self.file.close()
        write_atomically(self.path, lambda path: path.write_text("".join(kept)), fsync=True)
        self.file = self.path.open("a", buffering=1)

    def close(self) -> None:
        """Close the file and end wandb's run. A line that the disk has refused is lost, which `log` said."""
        with suppress(OSError):
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
