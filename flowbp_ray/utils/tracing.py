"""Names for spans of time within a process. Whoever runs it says what becomes of them: see `actors.process`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Span = Callable[[str], AbstractContextManager[object]]
_spans: list[Span] = []


def span(name: str) -> AbstractContextManager[object]:
    """A span called `name`, from entering to leaving it. Without `record_with` it costs nothing and leaves nothing."""
    return _spans[-1](name) if _spans else nullcontext()


def record_with(span: Span | None) -> None:
    """From now on, in this process, marks are spans of this kind; of no kind with None."""
    _spans[:] = [] if span is None else [span]
