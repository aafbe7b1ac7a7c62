"""status.json: what a run is doing at this moment, for any machine that sees its folder. Only the driver writes it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from flowbp_ray.observability.phases import PhaseTimer
from flowbp_ray.utils.files import write_atomically
from flowbp_ray.utils.secrets import hidden
from flowbp_ray.utils.signals import Interrupted

FILE = "status.json"
BEAT = 5.0  # seconds after which the file is written again without a change, to show that the driver is alive


@dataclass
class Status:
    """The contents of status.json.

    state: running, finished, stopped (on request) or failed; why: the first line of the error of the last two. phase:
    what the driver does; waiting: what it waits for. step: steps that are done, of `steps`; step_s: mean seconds of the
    last ones. seconds: by phase. since (the phase began), began (the run did), written: seconds since 1970. bounds: the
    fewest and most processes of each role that may grow and shrink.
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
    """The status in a run's folder; None where there is no status.json or it is not valid."""
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
    """Writes a run's status.json, atomically and only as often as needed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.last: dict[str, object] = {}
        self.written = 0.0

    def write(self, status: Status, force: bool = False) -> None:
        """Write when something changed, when BEAT seconds have passed, or when `force`.

        A disk that refuses is ignored: it must not end a run.
        """
        plain = asdict(status) | {"written": time.time()}
        news = {key: value for key, value in plain.items() if key not in ("written", "seconds")}
        if not force and news == self.last and time.time() - self.written < BEAT:
            return
        text = hidden(json.dumps(plain, indent=1)) + "\n"
        with suppress(OSError):
            write_atomically(self.path, lambda path: path.write_text(text))
            self.last, self.written = news, time.time()


class StatusWriter:
    """Keeps a run's status.json current: how far the run is, with the phase and the times at the moment of a write."""

    def __init__(self, phases: PhaseTimer, steps: int) -> None:
        self.phases = phases
        self.status = Status(steps=steps, began=time.time())
        self.file: StatusFile | None = None

    def open(self, folder: Path, bounds: Mapping[str, tuple[int, int]]) -> None:
        """Write to `folder` from now on. bounds: see `Status`."""
        self.file, self.status.bounds = StatusFile(folder), bounds

    def write(self, force: bool = False) -> None:
        """As `StatusFile.write`. Must not be called before `open`."""
        assert self.file is not None
        phases, status = self.phases, self.status
        status.phase, status.waiting, status.since = phases.name, phases.waiting, phases.since
        seconds = {**phases.seconds}
        seconds[phases.name] = seconds.get(phases.name, 0.0) + phases.elapsed()
        status.seconds = {name: round(value, 1) for name, value in seconds.items() if name}
        self.file.write(status, force)

    def close(self, error: BaseException | None) -> None:
        """Write how the run ended: finished, stopped on request, or failed with `error`."""
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        self.status.state = "finished" if error is None else "stopped" if stopped else "failed"
        self.status.why = "" if error is None else (str(error) or type(error).__name__).splitlines()[0]
        self.write(force=True)
