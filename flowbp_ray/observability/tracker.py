"""Writes metrics.jsonl, and sends the same numbers to trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.evaluation.estimates import Evaluation
from flowbp_ray.observability.catalog import grouped
from flowbp_ray.observability.destinations import Destination, reduced, run_id
from flowbp_ray.observability.mlflow_run import MlflowRun
from flowbp_ray.observability.tensorboard_run import TensorboardRun
from flowbp_ray.observability.wandb_run import WandbRun
from flowbp_ray.utils.files import naming, write_atomically
from flowbp_ray.utils.secrets import hidden

Export = Callable[[int, str, Mapping[str, Any]], None]
"""Takes a line of metrics.jsonl: its step, its kind and its numbers."""
Pictures = tuple[Sequence[np.ndarray], Sequence[str]]
"""Pictures [H, W, 3] uint8, and the prompt of each."""


class Tracker:
    """Logs to metrics.jsonl a line per step, evaluation and judge; and to the trackers that `tracking` turns on.

    A tracker that fails is left out from then on, with a line, and never stops the run.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        export: Export | None = None,
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        """folder: the run's. export: takes every line as well. say: prints a line that a person should know."""
        self.export, self.say = export, say
        self.path = folder / "metrics.jsonl"
        self.file = self.path.open("a", buffering=1)
        self.pictures, self.guidance = config.tracking.pictures, next(iter(config.evaluation.guidance), None)
        self.destinations = start(folder, config, say)

    def log(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Log a line. kind: train, evaluation or judge (which comes late). What is not finite is written as null.

        Raises OSError, which names the file, where the disk does not take it.
        """
        clean = {k: (None if isinstance(v, float) and not np.isfinite(v) else v) for k, v in values.items()}
        with naming(self.path):
            self.file.write(json.dumps({"step": step, "kind": kind, **clean}) + "\n")
        if self.export is not None:
            self.export(step, kind, clean)
        if self.destinations:
            numbers = grouped(kind, clean, self.guidance)
            self._send(lambda to: to.log(step, kind, numbers))

    def evaluated(self, step: int, results: Mapping[float, Evaluation], shown: Mapping[float, Pictures]) -> None:
        """Log an evaluation by guidance. shown: pictures and their prompts by guidance, for the trackers."""
        for guidance, result in results.items():
            self.log(step, "evaluation", {"guidance": guidance, **result.means()})
        for guidance, (pictures, prompts) in shown.items() if self.destinations and self.pictures else ():
            sent = reduced(pictures, prompts, self.pictures, guidance)
            self._send(lambda to, sent=sent: to.show(step, sent))  # type: ignore[misc]

    def _send(self, call: Callable[[Destination], object]) -> None:
        for to in list(self.destinations):
            try:
                call(to)
            except Exception as error:  # a tracker's errors are classes of its own library
                self.destinations.remove(to)
                self.say(f"{to.name}: {_line(error)}; it gets no more of this run, which metrics.jsonl has all of")

    def rewind(self, step: int) -> None:
        """Remove the lines that were logged after the checkpoint of `step` (-1: all lines), and torn ones.

        The lines of judges are removed too: restored from the checkpoint, the judges write them again.
        """
        self.file.close()
        write_atomically(self.path, lambda path: self._copy(path, step), fsync=True)
        self.file = self.path.open("a", buffering=1)
        self._send(lambda to: to.rewind(step))

    def _copy(self, path: Path, step: int) -> None:
        """Write the lines that `rewind` keeps, one at a time: a long run's log would fill the driver's memory."""
        with self.path.open() as lines, path.open("w") as kept:
            for line in lines:
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                before = entry["step"] < step or (entry["kind"] == "evaluation" and entry["step"] == step)
                if before and entry["kind"] != "judge":
                    kept.write(line.rstrip("\n") + "\n")

    def close(self) -> None:
        """Close the file and end the trackers. A line that the disk has refused is lost, which `log` said."""
        with suppress(OSError):
            self.file.close()
        self._send(lambda to: to.close())


def start(folder: Path, config: RunConfig, say: Callable[[str], object]) -> list[Destination]:
    """Start the trackers that `tracking` turns on. folder: the run's. say: takes a line where one does not start.

    Raises ValueError for a mistake of the user.
    """
    tracking, found = config.tracking, list[Destination]()
    known = (tracking.project, run_id(folder), config.model_dump(mode="json"))
    if tracking.wandb:
        found += WandbRun.open(folder, *known, say)
    if tracking.tensorboard:
        found.append(TensorboardRun(folder / "tensorboard"))
    if tracking.mlflow:
        try:
            found.append(MlflowRun(folder, *known))
        except Exception as error:  # MLflow's own classes
            say(f"mlflow: {_line(error)}; this run is not logged there, metrics.jsonl has all of it")
    return found


def _line(error: BaseException) -> str:
    """The error on one line, without secrets."""
    return hidden(" ".join(str(error).split()))[:200] or type(error).__name__
