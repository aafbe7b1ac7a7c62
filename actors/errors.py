"""What is made of Ray's errors."""

from __future__ import annotations

from ray.exceptions import RayError, RayTaskError


def is_permanent(error: Exception) -> bool:
    """Whether doing it again would fail again: what the user must change is a ValueError."""
    return isinstance(error, RayTaskError) and isinstance(error.cause, ValueError)


def arguments_arrived(error: Exception) -> bool:
    """Whether a call failed in the actor's own code: what it was given had arrived, and may be given to another.

    Ray raises its own errors there where an argument was lost with the node that held it.
    """
    return isinstance(error, RayTaskError) and not isinstance(error.cause, RayError)


def cause(error: Exception) -> str:
    """The last line that says something, without Ray's remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
