"""Items go on while the driver waits for the learners.

Samplers have two items each (`messages.DEPTH`). Where an optimizer step takes longer than two items, a driver that only
looks at the learners leaves them idle, and staleness 1 hides less than it could (docs/benchmarking.md has the numbers).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from actors.pipeline import Pipeline, arrivals


class Meanwhile:
    """Waits for references of others, and gives out and takes back a pipeline's items until one of them is there."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    def wait(self, refs: Sequence[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        """As `ray.wait(refs, timeout=timeout)`: those of `refs` that are there first, and the others."""
        until, pipeline = time.monotonic() + timeout, self.pipeline
        while True:
            pipeline.look(())
            running = {job.pending: job for job in pipeline.jobs if job.pending is not None}
            left = until - time.monotonic()
            found = arrivals([*refs, *running], min(1.0, max(0.0, left)))  # some who were down may be back meanwhile
            for ref in found:
                if ref in running:
                    pipeline._settle(running[ref])
            pipeline.samplers.recover()
            pipeline.scorers.recover()
            pipeline._dispatch()
            ready = [ref for ref in found if ref not in running]
            if ready or left <= 0:
                return ready, [ref for ref in refs if ref not in ready]
