"""The metrics of a run as Ray metrics, which each node's agent serves to Prometheus."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from flowbp_ray.observability.catalog import TABLE, Reading, readings

COLLECTION = "RAY_enable_metrics_collection"  # "0" in a private Ray, see `actors.cluster`
AGAIN = 1.0  # seconds; Ray's agents drop a gauge that is not set for two of their intervals, and a step may be longer


class RayMetrics:
    """Sets the gauges of `flowbp_ray.observability.catalog.TABLE` from the lines of metrics.jsonl, tagged with the run.

    A thread sets them again every AGAIN seconds until `close`, which takes 1 ms each time. It does nothing if Ray does
    not collect metrics.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.gauges: dict[str, Gauge] = {}
        self.newest: dict[tuple[str, ...], Reading] = {}
        self.closed = threading.Event()
        self.lock = threading.Lock()

    def __call__(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Take a line of metrics.jsonl. A value that is not finite is None there; its gauge is not set until it is."""
        if os.environ.get(COLLECTION) == "0":
            return
        line = {"step": step, **values} if kind == "train" else values
        with self.lock:
            if kind == "train":
                self.newest = {key: known for key, known in self.newest.items() if known.metric.key == "evaluation/*"}
            self.newest |= {(r.metric.key, *r.tags.values()): r for r in readings(kind, line)}
            if not self.gauges:  # at the first line, because Ray is running by then
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
        """Stop setting the gauges; soon after, Ray's agents drop them."""
        self.closed.set()
