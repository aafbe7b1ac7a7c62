"""Reads the state of a run from the files in its folder, whether it goes on, has ended or was killed. Needs no Ray."""

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

SILENT_AFTER = 4 * BEAT  # seconds without a new status after which a driver is called silent
TAIL = 65536  # bytes at the end of log.txt that are searched for warnings
WARNINGS = 3  # shown at most
Line = Mapping[str, Any]
Stage = Literal["running", "silent", "ended"]


@dataclass(frozen=True)
class RunSnapshot:
    """A run at one moment.

    state, stage: in words, and as a constant (see `state_of`). train: the lines of its steps in metrics.jsonl.
    evaluations: the lines of the last evaluation, one per guidance. requested: by role, the sizes that `scale` asked
    for and that the run has not taken yet. checkpoint: step of the newest one and its age in seconds. warnings: the
    last warnings and errors of log.txt.
    """

    folder: Path
    steps: int
    state: str
    stage: Stage
    status: Status
    train: list[Line]
    evaluations: list[Line]
    requested: Mapping[str, int]
    checkpoint: tuple[int, float] | None
    warnings: list[str]

    @property
    def done(self) -> int:
        """Steps that are done."""
        # metrics.jsonl of a driver that was killed may be ahead of its status.json
        logged = int(self.train[-1]["step"]) + 1 if self.train else 0
        return max(self.status.step, logged)


class Reader:
    """Reads a run's folder repeatedly; of metrics.jsonl only what was added."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigError where there is no run in `folder`."""
        self.run = Run.open(folder)
        self.lines: list[Line] = []
        self.offset, self.inode = 0, 0  # of what was read of metrics.jsonl

    def snapshot(self) -> RunSnapshot:
        """The run as its files say it is now."""
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
            requested=scaling.pending_requests(self.run),
            checkpoint=self._checkpoint(now),
            warnings=last_warnings(folder / "log.txt"),
        )

    def _follow(self) -> None:
        """Read the whole lines that were added; all lines again where there is a new file.

        A run that goes back to a checkpoint writes a new one.
        """
        try:
            with (self.run.folder / "metrics.jsonl").open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self.inode or file.seek(0, 2) < self.offset:
                    self.lines, self.offset, self.inode = [], 0, inode
                file.seek(self.offset)
                added = file.read()
        except OSError:
            return
        whole = added[: added.rfind(b"\n") + 1]
        self.offset += len(whole)
        for text in whole.splitlines():
            try:
                line = json.loads(text)
                self.lines += [line] if {"step", "kind"} <= line.keys() else []
            except (ValueError, AttributeError):  # torn by a kill
                continue

    def _steps(self) -> int:
        """`steps` of config.yaml, which is not validated: the files that it names need not be on this machine."""
        try:
            return int(yaml.safe_load((self.run.folder / "config.yaml").read_text())["steps"])
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            return 0

    def _checkpoint(self, now: float) -> tuple[int, float] | None:
        steps = self.run.checkpoints.steps()
        try:
            age = now - self.run.checkpoints.path(steps[-1]).stat().st_mtime
        except (IndexError, OSError):
            return None
        return steps[-1], max(0.0, age)


def state_of(run: Run, status: Status | None, now: float) -> tuple[str, Stage]:
    """The state in words, and whether the run goes on, is silent (killed, or cut off from the folder) or has ended.

    status: None where there is no valid status.json. now: seconds since 1970.
    """
    if status is None:
        if (run.folder / "summary.json").is_file():
            return "finished", "ended"
        return "unknown: there is no status.json", "silent"
    if status.state == "finished":
        return ("finished, ended by the guard" if (run.folder / guard.FILE).is_file() else "finished"), "ended"
    if status.state in ("stopped", "failed"):
        stalled = status.state == "failed" and _modified_since(run.folder / "stalled.json", status.began)
        return f"{'stalled' if stalled else status.state}: {status.why}", "ended"
    silence = now - status.written
    if silence > SILENT_AFTER:
        return (
            f"silent for {format_duration(silence)}, in the phase {status.phase}: killed, or cut off from this folder",
            "silent",
        )
    waiting = f": {status.waiting}" if status.waiting else ""
    return f"{status.phase} for {format_duration(max(0.0, now - status.since))}{waiting}", "running"


def _modified_since(path: Path, moment: float) -> bool:
    return path.is_file() and path.stat().st_mtime >= moment


def last_warnings(log: Path) -> list[str]:
    """The last warnings and errors in a log file, oldest first."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if " WARNING " in line or " ERROR " in line][-WARNINGS:]


def format_duration(seconds: float) -> str:
    """A duration as 42 s, 12 min or 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
