"""How a run fails after it began. What a user must change is a ValueError instead."""

from __future__ import annotations

from typing import Any


class RunFailed(RuntimeError):
    """The run cannot go on; the message names the cause."""


class Stalled(RunFailed):
    """Work is left and nothing moves. state: every item and actor, for whoever looks into it."""

    def __init__(self, message: str, state: dict[str, Any]) -> None:
        super().__init__(message)
        self.state = state
