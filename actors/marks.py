"""Marks in `ray timeline`: only where RAY_PROFILING is set, before Ray is imported; a mark then takes microseconds."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import ray
from ray._private import profiling  # there is no public name for it

from flowbp_ray.utils import tracing

PROFILING = "RAY_PROFILING"
KEPT = "RAY_task_events_max_num_profile_events_per_task"
MANY = "100000"
"""Ray keeps the first 1000 events of a task, which a whole driver is; its waits count too."""


def environment() -> dict[str, str]:
    """What an actor's process must have in its environment for its marks to appear, where the driver's do."""
    return {name: os.environ[name] for name in (PROFILING, KEPT) if name in os.environ}


def record() -> None:
    """Write down this process's marks, if Ray profiles."""
    if profiling.PROFILING_ENABLED:
        os.environ.setdefault(KEPT, MANY)
        tracing.record_with(_span)


def _span(name: str) -> AbstractContextManager[object]:
    if not ray.is_initialized():
        return nullcontext()
    return profiling.profile(f"flowbp_ray: {name}", extra_data={"name": name})  # type: ignore[no-any-return]
