"""Paired measurements: A and B in turn, so that what slows the machine slows both; the median of the ratios counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process, all threads, while `work` runs."""
    started = time.process_time()
    work()
    return time.process_time() - started


def paired(a: Callable[[], float], b: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Medians of `pairs` pairs of measurements, after one of each that does not count; `ratio` is a / b."""
    a(), b()
    measured = []
    for turn in range(pairs):
        order = (a, b) if turn % 2 == 0 else (b, a)
        values = {f: f() for f in order}
        measured.append((values[a], values[b]))
    ratios = sorted(x / y for x, y in measured)
    return {
        "pairs": pairs,
        "a_s": round(statistics.median(x for x, _ in measured), 4),
        "b_s": round(statistics.median(y for _, y in measured), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(r, 3) for r in ratios],
    }
