"""Slopes with their 95 % intervals, by least squares over means of consecutive samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

FEWEST = 4  # means; with fewer no interval is worth stating

Series = tuple[Sequence[float], Sequence[float]]
"""x and y, of one process."""


@dataclass(frozen=True)
class Slope:
    """Per unit of x. low, high: the 95 % interval. level: the mean of the last quarter of y. points: means fitted.

    span: the range of x that the longest group covers.
    """

    value: float
    low: float
    high: float
    level: float
    points: int
    span: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def means(series: Series, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of `block` samples in a row each; the first samples that fill no block are left out.

    Samples that follow each other are alike, as of a heap that grows and shrinks; their means hardly are, so that the
    interval of a fit through the means is honest.
    """
    count = len(series[0]) // block
    x, y = (np.asarray(part, np.float64)[len(part) - count * block :].reshape(count, block) for part in series)
    return x.mean(axis=1), y.mean(axis=1)


def slope(groups: Sequence[Series], block: int = 1, beside: Sequence[float] = ()) -> Slope | None:
    """Fit one slope to all groups, each with a level of its own. None where there are fewer than FEWEST means.

    With x', y' the deviations from the group's mean: b = Σ x'y' / Σ x'²; the residual variance has n − groups − 1
    degrees of freedom, and the interval is Student's t. beside: another quantity that y may grow with, of the only
    group: x and y are taken as they deviate from their own fits to it (theorem of Frisch, Waugh and Lovell), which
    takes one degree more.
    """
    parts = [means(series, block) for series in groups]
    parts = [(x, y) for x, y in parts if len(x) > 1 and np.ptp(x) > 0]
    if not parts or sum(len(x) for x, _ in parts) < max(FEWEST, len(parts) + 2 + bool(len(beside))):
        return None
    x = np.concatenate([x - x.mean() for x, _ in parts])
    y = np.concatenate([y - y.mean() for _, y in parts])
    if len(beside):
        z = means((beside, beside), block)[0]
        z = z - z.mean()
        x, y = (part - z * float(part @ z) / max(1e-12, float(z @ z)) for part in (x, y))
    value, free = float(x @ y / max(1e-12, float(x @ x))), len(x) - len(parts) - 1 - bool(len(beside))
    error = np.sqrt(float(((y - value * x) ** 2).sum()) / free / max(1e-12, float(x @ x)))
    half = float(stats.t.ppf(0.975, free)) * float(error)
    span = max(float(np.ptp(series[0])) for series in groups if len(series[0]))
    ends = [np.asarray(series[1], np.float64) for series in groups if len(series[1])]
    level = float(np.mean([part[-max(1, len(part) // 4) :].mean() for part in ends]))
    return Slope(value, value - half, value + half, level, len(x), span)
