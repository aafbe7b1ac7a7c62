"""Named spans of time within a process. `record_with` sets how they are recorded: see `actors.process`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Span = Callable[[str], AbstractContextManager[object]]
_spans: list[Span] = []


def span(name: str) -> AbstractContextManager[object]:
    """A context manager that records a span called `name`. Without `record_with` it does nothing."""
    return _spans[-1](name) if _spans else nullcontext()


def record_with(span: Span | None) -> None:
    """Record this process's spans with `span` from now on; None records nothing."""
    _spans[:] = [] if span is None else [span]
