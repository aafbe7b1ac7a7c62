"""The logs of the judges' own servers, copied from their nodes into the run's folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from flowbp_ray.judges.tail import ReadOffset
from flowbp_ray.utils.secrets import hidden

PATIENCE = 5.0  # seconds to wait for the last lines at the end of a run


class Logs:
    """Writes judge-NAME.log for every followed judge. A log that cannot be read does not stop the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handles: dict[str, Any] = {}
        self.marks: dict[str, ReadOffset] = {}
        self.calls: dict[str, Any] = {}

    def path(self, name: str) -> Path:
        return (self.folder / f"judge-{name}.log").resolve()

    def follow(self, name: str, handle: Any) -> None:
        """Start copying a judge's log. handle: of a `JudgeActor` that starts its own server."""
        self.handles[name], self.marks[name] = handle, ReadOffset()
        self._ask(name)

    def take(self) -> None:
        """Append the parts that have arrived and request the next ones, without waiting."""
        for name, call in list(self.calls.items()):
            if ray.wait([call], timeout=0)[0]:
                self._append(name)
                self._ask(name)

    def finish(self, patience: float = PATIENCE) -> None:
        """Append everything that is written by now, within `patience` seconds, and delete the logs on the nodes."""
        until, forgotten = time.monotonic() + patience, []
        for name, handle in self.handles.items():
            now = False  # whether the call was made in this loop, so that its answer is up to date
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
        """Append an answer that has arrived; return whether it had any text.

        If the process died, the next request goes to the restarted one and continues at the mark.
        """
        try:
            part, self.marks[name] = ray.get(self.calls[name])
        except RayError:
            return False
        if part:
            text = hidden(part.decode(errors="surrogateescape"))
            with self.path(name).open("ab") as file:
                file.write(text.encode(errors="surrogateescape"))
        return bool(part)
