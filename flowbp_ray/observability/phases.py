"""How long the driver's phases take. A phase lasts until the next one begins, and is a span in the timeline."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from flowbp_ray.utils.tracing import span


class PhaseTimer:
    """The driver's present phase, what it waits for, and how often and how long each phase was so far.

    name: of the present phase, "" for none; waiting: what is waited for in it, as text; since: when it began, in
    seconds since 1970. seconds, counts: of the phases that ended, by name.
    """

    def __init__(self) -> None:
        self.name = self.waiting = ""
        self.since = time.time()
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self._at_last_lap: dict[str, float] = {}
        self._began = time.perf_counter()
        self._span: AbstractContextManager[object] | None = None

    def enter(self, name: str) -> None:
        """End the present phase and begin the phase `name`; with "" none begins."""
        now = time.perf_counter()
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self._began
            self.counts[self.name] = self.counts.get(self.name, 0) + 1
        self.name, self.waiting, self.since, self._began = name, "", time.time(), now
        self._span = span(name) if name else None
        if self._span is not None:
            self._span.__enter__()

    def elapsed(self) -> float:
        """Seconds since the present phase began."""
        return time.perf_counter() - self._began

    def mean(self) -> float:
        """Mean seconds that the present phase took before; 0 the first time."""
        return self.seconds.get(self.name, 0.0) / max(1, self.counts.get(self.name, 0))

    def lap(self, name: str) -> float:
        """Seconds of the phase `name` that ended since the last call for it."""
        total, before = self.seconds.get(name, 0.0), self._at_last_lap.get(name, 0.0)
        self._at_last_lap[name] = total
        return total - before
