"""What a driver is at: a phase lasts until the next one begins, and is a mark in the timeline."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from flowbp_ray.utils.tracing import span


class Phases:
    """Seconds and turns of each phase so far, and what is waited for in the present one."""

    def __init__(self) -> None:
        self.name = self.waiting = ""
        self.since = time.time()
        self.seconds: dict[str, float] = {}
        self.turns: dict[str, int] = {}
        self._asked: dict[str, float] = {}
        self._began = time.perf_counter()
        self._mark: AbstractContextManager[object] | None = None

    def enter(self, name: str) -> None:
        """The phase `name` begins, and the one before it ends; with "" none begins."""
        now = time.perf_counter()
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self._began
            self.turns[self.name] = self.turns.get(self.name, 0) + 1
        self.name, self.waiting, self.since, self._began = name, "", time.time(), now
        self._mark = span(name) if name else None
        if self._mark is not None:
            self._mark.__enter__()

    def lasted(self) -> float:
        """Seconds of the present phase."""
        return time.perf_counter() - self._began

    def usual(self) -> float:
        """Mean seconds that the present phase took before; 0 the first time."""
        return self.seconds.get(self.name, 0.0) / max(1, self.turns.get(self.name, 0))

    def since_last(self, name: str) -> float:
        """Seconds of the phase `name` since this was last asked."""
        now, before = self.seconds.get(name, 0.0), self._asked.get(name, 0.0)
        self._asked[name] = now
        return now - before
