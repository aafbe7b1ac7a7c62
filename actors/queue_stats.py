"""Statistics of the pipeline's queues: a status line while the driver waits, and means over a step as metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from actors.pipeline import Job, Pipeline
from actors.pool import Pool

EVERY = 0.1  # seconds between two counts
LONGEST = 5.0  # seconds between two counts
SHARE = 0.01  # of the time at most is spent on counts, each of which may go through tens of thousands of items
STAGES = {"queued": "queued", "rolling": "rolling", "rolled": "not given to a reward server", "scoring": "being scored"}


class QueueStats:
    """Counts a pipeline's items by stage, weighted by time."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        """notify: takes a line on what the driver waits for."""
        self.notify = notify
        self.at = self.began = self.next = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()  # item seconds since `began`

    def observe(self, pipeline: Pipeline, wanted: Sequence[Job] = ()) -> None:
        """Count the items, at most every EVERY seconds. wanted: the items that the driver waits for, if any."""
        if time.monotonic() < self.next and self.counts:
            return
        began = time.thread_time()
        self._add()
        pools = (pipeline.samplers, pipeline.scorers)
        self.counts = Counter(job.stage for job in pipeline.jobs if not job.dropped)
        self.counts["silent"] = sum(len(pool.silent) for pool in pools)
        if wanted:
            encoding = "" if pipeline.encoding.complete else f"; {pipeline.encoding.describe()}"
            self.notify(self.describe(wanted, pools) + encoding)
        self.next = self.at + min(max(EVERY, (time.thread_time() - began) / SHARE), LONGEST)

    def describe(self, wanted: Sequence[Job], pools: Sequence[Pool]) -> str:
        """A status line: `waiting for samplers: 16 of 32 pictures are there; items: 1 queued, 3 rolling`."""
        stages = Counter(job.stage for job in wanted)
        who = "samplers" if stages["queued"] + stages["rolling"] else "reward servers"
        there = sum(job.item.rows for job in wanted if job.stage == "done")
        parts = ", ".join(f"{stages[stage]} {words}" for stage, words in STAGES.items() if stages[stage])
        pictures = sum(job.item.rows for job in wanted)
        line = f"waiting for {who}: {there} of {pictures} pictures are there; items: {parts}"
        for pool in pools:
            if pool.silent:
                line += f"; no answer from {pool.name} {', '.join(map(str, pool.silent))}"
        return line

    def means(self) -> dict[str, float]:
        """`queue/<stage>`: the mean number of items per stage since the last call; `queue/silent`: of silent actors."""
        self._add()
        seconds, sums = self.at - self.began, self.sums
        self.began, self.sums = self.at, Counter()
        return {f"queue/{stage}": sums[stage] / seconds if seconds else 0.0 for stage in (*STAGES, "silent")}

    def _add(self) -> None:
        now = time.monotonic()
        for stage, count in self.counts.items():
            self.sums[stage] += count * (now - self.at)  # type: ignore[assignment]
        self.at = now
