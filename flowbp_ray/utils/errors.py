"""How a run fails after it began. What a user must change is a ValueError instead."""

from __future__ import annotations

import difflib
from typing import Any


class RunFailed(RuntimeError):
    """The run cannot go on; the message names the cause."""


class Stalled(RunFailed):
    """Work is left and nothing moves. state: every item and actor, for whoever looks into it."""

    def __init__(self, message: str, state: dict[str, Any]) -> None:
        super().__init__(message)
        self.state = state


class ConfigError(ValueError):
    """Something a user wrote cannot be used; the message says what to write instead."""


def nearest(word: str, known: list[str], what: str) -> str:
    """A message about an unknown word: `unknown <what> 'x'; did you mean 'y'?`, or the list of what is known."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return f"unknown {what} {word!r}; {hint}"
