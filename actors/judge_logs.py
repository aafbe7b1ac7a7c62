"""What the judges' own servers write, copied from their nodes into the run's folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from flowbp_ray.judges.tail import ReadOffset

PATIENCE = 5.0  # seconds at the end of a run for the last lines


class Logs:
    """judge-NAME.log of every judge that is followed. A log that cannot be had is no reason to stop a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handles: dict[str, Any] = {}
        self.marks: dict[str, ReadOffset] = {}
        self.calls: dict[str, Any] = {}

    def path(self, name: str) -> Path:
        return (self.folder / f"judge-{name}.log").resolve()

    def follow(self, name: str, handle: Any) -> None:
        """handle: of a `JudgeActor` whose server is its own."""
        self.handles[name], self.marks[name] = handle, ReadOffset()
        self._ask(name)

    def take(self) -> None:
        """Append what has come since it was last asked for, and ask for more. Waits for nobody."""
        for name, call in list(self.calls.items()):
            if ray.wait([call], timeout=0)[0]:
                self._append(name)
                self._ask(name)

    def finish(self, patience: float = PATIENCE) -> None:
        """Append all that is there by now, for so many seconds, and remove it from the judges' nodes."""
        until, forgotten = time.monotonic() + patience, []
        for name, handle in self.handles.items():
            now = False  # whether the call was made by us, so that its answer is not of the past
            while ray.wait([self.calls[name]], timeout=max(0.0, until - time.monotonic()))[0]:
                if not self._append(name) and now:
                    forgotten.append(handle.forget.remote())
                    break
                self._ask(name)
                now = True
        if forgotten:
            ray.wait(forgotten, num_returns=len(forgotten), timeout=max(0.5, until - time.monotonic()))
        self.handles, self.calls = {}, {}

    def _ask(self, name: str) -> None:
        self.calls[name] = self.handles[name].said.remote(self.marks[name])

    def _append(self, name: str) -> bool:
        """Take an answer that is there; whether it said something. Of a lost process the next one goes on."""
        try:
            part, self.marks[name] = ray.get(self.calls[name])
        except RayError:
            return False
        if part:
            with self.path(name).open("ab") as file:
                file.write(part)
        return bool(part)
