"""Work that goes on beside the rest of a process, and whether the host's memory has room for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")
CGROUP = Path("/sys/fs/cgroup")


def started(call: Callable[[], T]) -> Future[T]:
    """Call it in a thread that does not keep the process from ending; the future has its result, or what it raised."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def done(call: Callable[[], T]) -> Future[T]:
    """Call it at once. Raises what it raises."""
    future: Future[T] = Future()
    future.set_result(call())
    return future


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes of host memory that this process may still take: of the machine, and of its container (cgroup v2)."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # no container, no limit ("max"), or an older kind of cgroup
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        lines = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = int(dict(line for line in lines if len(line) == 2)["inactive_file"])  # which the kernel gives back
        free = min(free, limit - used + cached)
    return free
