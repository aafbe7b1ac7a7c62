"""A suite as a picture: a panel per column, a line per row, each seed a point, the mean with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flowbp_ray.comparing.results import Comparison, percent
from flowbp_ray.comparing.suite import BASE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 0.34  # inches of a row


def draw(found: Comparison) -> Figure:
    """Panels in the order of the columns, rows in that of the suite; the base, which is far away, is a number."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in found.table if row != BASE]
    size = (2.6 + 2.7 * len(found.columns), 1.1 + HEIGHT * len(rows))
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found.columns), sharey=True, squeeze=False)
    for panel, column in zip(panels[0], found.columns, strict=True):
        factor = 100 if percent(column) else 1
        for at, row in enumerate(rows):
            seeds = [factor * run["after"][column] for run in found.raw if run["row"] == row and column in run["after"]]
            panel.plot(seeds, [at] * len(seeds), "o", color="0.7", ms=4, label="a seed")
            value = found.table[row][column]
            half = factor * value.half if value.half is not None else None
            panel.errorbar([factor * value.mean], [at], xerr=half, fmt="D", color="C0", ms=5, capsize=3, label="mean")
        title, base = f"{column}, %" if factor == 100 else column, factor * found.table[BASE][column].mean
        known = f"base: {base:.{1 if factor == 100 else 3}f}" if np.isfinite(base) else "base: –"
        panel.set_title(f"{title}\n{known}", fontsize=10, parse_math=False)
        panel.grid(axis="x", color="0.92")
    panels[0][0].set_yticks(range(len(rows)), rows, parse_math=False)
    panels[0][0].invert_yaxis()
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """The figure as [H, W, 3] uint8."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
