"""The numbers of a run as Ray metrics, which each node's agent serves to Prometheus."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from flowbp_ray.observability.catalog import TABLE, Reading, readings

COLLECTION = "RAY_enable_metrics_collection"  # "0" in a Ray of our own, see `actors.cluster`
AGAIN = 1.0  # seconds: Ray's agents forget a gauge that is not set for two of their intervals, and steps may be long


class RayMetrics:
    """Sets the gauges of `observed.table` from the lines that go to metrics.jsonl; all have the run's name as a tag.

    They are set again and again until it is closed, in 1 ms each time. Where Ray collects no metrics nothing is done.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.gauges: dict[str, Gauge] = {}
        self.newest: dict[tuple[str, ...], Reading] = {}
        self.closed = threading.Event()
        self.lock = threading.Lock()

    def __call__(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """A line. What is not finite is None there, and the gauge is left out until it is a number again."""
        if os.environ.get(COLLECTION) == "0":
            return
        line = {"step": step, **values} if kind == "train" else values
        with self.lock:
            if kind == "train":
                self.newest = {key: known for key, known in self.newest.items() if known.metric.key == "evaluation/*"}
            self.newest |= {(r.metric.key, *r.tags.values()): r for r in readings(kind, line)}
            if not self.gauges:  # the first line comes when Ray is up
                self.gauges = {m.key: Gauge(m.exported, m.meaning, ("run", *m.tags)) for m in TABLE}
                threading.Thread(target=self._keep, daemon=True).start()
        self._set()

    def _set(self) -> None:
        with self.lock:
            for reading in self.newest.values():
                self.gauges[reading.metric.key].set(reading.value, {"run": self.run, **reading.tags})

    def _keep(self) -> None:
        while not self.closed.wait(AGAIN):
            self._set()

    def close(self) -> None:
        """Let the run's numbers go; what is scraped a little later has them no more."""
        self.closed.set()
