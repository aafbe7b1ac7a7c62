"""What the files of a run say, whoever wrote them and whether or not the run goes on. Nothing here needs Ray."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from flowbp_ray.control import guard, scaling
from flowbp_ray.observability import status as status_file
from flowbp_ray.observability.status import BEAT, Status
from flowbp_ray.run.folder import Run

SILENT = 4 * BEAT  # seconds without a sign after which a driver is called silent
TAIL = 65536  # bytes of log.txt that are searched for warnings
WARNINGS = 3
Line = Mapping[str, Any]
Stage = Literal["going", "lost", "over"]


@dataclass(frozen=True)
class RunSnapshot:
    """A run at one moment. train: its steps' lines; evaluations: the lines of the last evaluation, one per guidance.

    state and stage: what `state_of` says. asked: the sizes that `scale` asked for and that are not taken yet. saved:
    the newest checkpoint and how old it is, in seconds. warnings: the last warnings and errors of log.txt.
    """

    folder: Path
    steps: int
    state: str
    stage: Stage
    status: Status
    train: list[Line]
    evaluations: list[Line]
    asked: Mapping[str, int]
    saved: tuple[int, float] | None
    warnings: list[str]

    @property
    def done(self) -> int:
        """Steps that are done; the log of a driver that was killed may be ahead of its status."""
        logged = int(self.train[-1]["step"]) + 1 if self.train else 0
        return max(self.status.step, logged)


class Reader:
    """Reads a run's folder again and again; of metrics.jsonl only what is new. Raises ConfigError where no run is."""

    def __init__(self, folder: str | Path) -> None:
        self.run = Run.open(folder)
        self.lines: list[Line] = []
        self.at, self.inode = 0, 0

    def look(self) -> RunSnapshot:
        folder, now = self.run.folder, time.time()
        self._follow()
        found = status_file.read(folder)
        state, stage = state_of(self.run, found, now)
        evaluated = [line for line in self.lines if line["kind"] == "evaluation"]
        return RunSnapshot(
            folder=folder,
            steps=found.steps if found else self._steps(),
            state=state,
            stage=stage,
            status=found or Status(state="unknown", phase=""),
            train=[line for line in self.lines if line["kind"] == "train"],
            evaluations=[line for line in evaluated if line["step"] == evaluated[-1]["step"]],
            asked=scaling.pending_requests(self.run),
            saved=self._saved(now),
            warnings=warnings(folder / "log.txt"),
        )

    def _follow(self) -> None:
        """Take the whole lines that were added. A run that goes back to a checkpoint writes a new file."""
        try:
            with (self.run.folder / "metrics.jsonl").open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self.inode or file.seek(0, 2) < self.at:
                    self.lines, self.at, self.inode = [], 0, inode
                file.seek(self.at)
                added = file.read()
        except OSError:
            return
        whole = added[: added.rfind(b"\n") + 1]
        self.at += len(whole)
        for text in whole.splitlines():
            try:
                line = json.loads(text)
                self.lines += [line] if {"step", "kind"} <= line.keys() else []
            except (ValueError, AttributeError):  # torn by a kill
                continue

    def _steps(self) -> int:
        """From config.yaml as it lies there: what it names need not be on this machine."""
        try:
            return int(yaml.safe_load((self.run.folder / "config.yaml").read_text())["steps"])
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            return 0

    def _saved(self, now: float) -> tuple[int, float] | None:
        steps = self.run.checkpoints.steps()
        try:
            age = now - self.run.checkpoints.path(steps[-1]).stat().st_mtime
        except (IndexError, OSError):
            return None
        return steps[-1], max(0.0, age)


def state_of(run: Run, status: Status | None, now: float) -> tuple[str, Stage]:
    """In words, and whether the run goes on. A driver that was killed says nothing any more."""
    if status is None:
        if (run.folder / "summary.json").is_file():
            return "finished", "over"
        return "unknown: there is no status.json", "lost"
    if status.state == "finished":
        return ("finished, ended by the guard" if (run.folder / guard.FILE).is_file() else "finished"), "over"
    if status.state in ("stopped", "failed"):
        stalled = status.state == "failed" and newer(run.folder / "stalled.json", status.began)
        return f"{'stalled' if stalled else status.state}: {status.why}", "over"
    quiet = now - status.written
    if quiet > SILENT:
        return (
            f"silent for {format_duration(quiet)}, in the phase {status.phase}: killed, or cut off from this folder",
            "lost",
        )
    waiting = f": {status.waiting}" if status.waiting else ""
    return f"{status.phase} for {format_duration(max(0.0, now - status.since))}{waiting}", "going"


def newer(path: Path, moment: float) -> bool:
    return path.is_file() and path.stat().st_mtime >= moment


def warnings(log: Path) -> list[str]:
    """The last lines of a log that are warnings or errors."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if " WARNING " in line or " ERROR " in line][-WARNINGS:]


def format_duration(seconds: float) -> str:
    """42 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
