"""The numbers of a run as Ray metrics, which each node's agent serves to Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from flowbp_ray.observed.table import TABLE, readings


class Exporter:
    """Sets the gauges of `observed.table` from the lines that go to metrics.jsonl; all have the run's name as a tag.

    Where Ray collects no metrics (a Ray of our own) setting one takes a few microseconds and leaves nothing.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.gauges: dict[str, Gauge] = {}

    def __call__(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """A line. What is not finite is None there, and the gauge keeps what it had."""
        if not self.gauges:  # the first line comes when Ray is up
            self.gauges = {m.key: Gauge(m.exported, m.meaning, ("run", *m.tags)) for m in TABLE}
        line = {"step": step, **values} if kind == "train" else values
        for reading in readings(kind, line):
            self.gauges[reading.metric.key].set(reading.value, {"run": self.run, **reading.tags})
