"""Paired measurements: A and B in turn, so that what slows the machine slows both; the median of the ratios counts."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any


def paired(a: Callable[[], float], b: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Medians of `pairs` pairs of measurements; `ratio` is a / b. Run both once before: the first does not count."""
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


def alone(measure: Callable[[], float] | None, repeats: int) -> float | None:
    """The median of one side where the other does not fit; None for the one that does not."""
    return None if measure is None else round(statistics.median(measure() for _ in range(repeats)), 4)
