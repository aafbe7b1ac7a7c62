"""status.json: what a run is doing at this moment, for whoever sees its folder. The driver writes it, nobody else."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from flowbp_ray.utils.files import write_atomically

FILE = "status.json"
BEAT = 5.0  # seconds after which it is written again though nothing has changed: silence means that the driver is gone


@dataclass
class Status:
    """state: running, finished, stopped (on request) or failed. Times are seconds since 1970; seconds: per phase.

    bounds: of the pools that may grow and shrink, fewest and most.
    """

    state: str = "running"
    phase: str = "starting"
    waiting: str = ""
    since: float = 0.0
    step: int = 0
    steps: int = 0
    step_s: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    began: float = 0.0
    written: float = 0.0
    host: str = field(default_factory=socket.gethostname)
    why: str = ""
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def read(folder: Path) -> Status | None:
    """What the file says; None where there is none, or nothing that could be understood."""
    try:
        found = json.loads((folder / FILE).read_text())
        status = Status(**{f.name: found[f.name] for f in fields(Status)})
        status.step, status.steps = int(status.step), int(status.steps)
        status.since, status.began, status.written = float(status.since), float(status.began), float(status.written)
        status.bounds = {role: (int(least), int(most)) for role, (least, most) in status.bounds.items()}
        status.step_s, status.seconds = float(status.step_s), {k: float(v) for k, v in status.seconds.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return status


class StatusFile:
    """Written under another name and renamed, so that nobody reads half of it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.last: dict[str, object] = {}
        self.written = 0.0

    def write(self, status: Status, now: bool = True) -> None:
        """Unless `now`, only where something changed or it is time. A disk that refuses does not end a run."""
        plain = asdict(status) | {"written": time.time()}
        told = {key: value for key, value in plain.items() if key not in ("written", "seconds")}
        if not now and told == self.last and time.time() - self.written < BEAT:
            return
        with suppress(OSError):
            write_atomically(self.path, lambda path: path.write_text(json.dumps(plain, indent=1) + "\n"))
            self.last, self.written = told, time.time()
