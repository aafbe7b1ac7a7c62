"""Charts as inline SVG: lines over steps or guidance, and a mean with its interval. Text stays text, colours are CSS's.

Pure functions of numbers. Names are data and are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

import numpy as np

WIDTH, HEIGHT = 360, 214  # of a chart, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 34
POINTS = 300  # of a line at most; longer ones are drawn by the means of as many parts
FEW = 24  # points that get a dot each, with its value
COLOURS = 8  # that the style sheet has


@dataclass(frozen=True)
class Series:
    """A line of a chart. ys: NaN where there is no value. low, high: intervals [n], where there are any."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Mark:
    """A line across a chart, at x or at y."""

    name: str
    x: float | None = None
    y: float | None = None


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str = "step",
    percent: bool = False,
    marks: Sequence[Mark] = (),
    smooth: bool = True,
) -> str:
    """A figure of lines over a common x with a legend; percent: of shares from 0 to 1. Nothing without a finite value.

    A line of more than POINTS points is thinned (`thinned`). With `smooth`, one of more than FEW points is drawn
    faintly, below its moving mean. Over steps the legend says the last value too.
    """
    series = [thinned(s) for s in series if np.isfinite(np.asarray(s.ys, float)).any()]
    if not series:
        return ""
    frame = _Frame.around(series, marks, percent)
    parts = [frame.axes(x_label)]
    for number, one in enumerate(series):
        aside = 5.0 * (number - (len(series) - 1) / 2) if one.low is not None else 0.0  # intervals beside each other
        parts.append(f'<g class="c{number % COLOURS}">{_line(frame, one, smooth, aside)}</g>')
    for mark in marks:
        parts.append(_mark(frame, mark))
    legend = "".join(
        f'<li class="c{i % COLOURS}"><i></i>{escape(one.name)}{_value(one, percent) if x_label == "step" else ""}</li>'
        for i, one in enumerate(series)
    )
    legend += "".join(f'<li class="mark"><i></i>{escape(mark.name)}</li>' for mark in marks)
    said = "; ".join(f"{one.name} ends at {_last(one, percent)}" for one in series)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {said}")}">'
        f"{''.join(parts)}</svg>"
        f"<ul>{legend}</ul></figure>"
    )


def interval_bar(mean: float, low: float, high: float, extent: float) -> str:
    """A mean with its interval on a line from −extent to extent, with zero in the middle."""
    x = {name: 60 + 56 * max(-1.0, min(1.0, v / extent)) for name, v in (("m", mean), ("l", low), ("h", high))}
    return (
        '<svg class="interval" viewBox="0 0 120 16" aria-hidden="true">'
        '<line class="zero" x1="60" y1="0" x2="60" y2="16"/>'
        f'<line class="range" x1="{x["l"]:.1f}" y1="8" x2="{x["h"]:.1f}" y2="8"/>'
        f'<circle cx="{x["m"]:.1f}" cy="8" r="3.5"/></svg>'
    )


def thinned(series: Series) -> Series:
    """The series by the means of at most POINTS parts of it, one after the other; itself where it is no longer."""
    size = -(-len(series.xs) // POINTS)
    if size <= 1:
        return series

    def means(values: Sequence[float]) -> list[float]:
        parts = [np.asarray(values[i : i + size], float) for i in range(0, len(values), size)]
        return [float(np.mean(p[np.isfinite(p)])) if np.isfinite(p).any() else math.nan for p in parts]

    return Series(series.name, means(series.xs), means(series.ys))


def ticks(low: float, high: float, count: int = 6, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from low to high; whole: integers only."""
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float, percent: bool = False) -> str:
    """A value as text, short: 0.5174, 1.5e-04, 43.6 %."""
    if not math.isfinite(value):
        return "none"
    if percent:
        return f"{100 * value:.1f} %"
    return f"{value:.2e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e5) else f"{value:.4g}"


def _short(value: float) -> str:
    """A number of an axis in as few characters as are exact enough: 0.05, 1.5e-4, 2e5."""
    mantissa, exponent = f"{value:.4e}".split("e")
    return min(f"{value:.5g}", f"{float(mantissa):g}e{int(exponent)}", key=len)


@dataclass(frozen=True)
class _Frame:
    """The ranges of a chart's axes, and where a value lies."""

    x0: float
    x1: float
    y0: float
    y1: float
    percent: bool
    inset: float  # pixels between the ends of x and those of the axis
    xs: Sequence[float]  # the numbers on the x axis

    @classmethod
    def around(cls, series: Sequence[Series], marks: Sequence[Mark], percent: bool) -> _Frame:
        xs = np.concatenate([np.asarray(s.xs, float) for s in series])
        ys = np.concatenate([np.asarray(v, float) for s in series for v in (s.ys, s.low, s.high) if v is not None])
        ys = ys[np.isfinite(ys)]
        ys = np.append(ys, [m.y for m in marks if m.y is not None])
        (x0, x1), (y0, y1) = (_widened(float(v.min()), float(v.max())) for v in (xs, ys))
        if percent:
            y0, y1 = max(0.0, y0), min(1.0, y1)
        room = 0.06 * (y1 - y0)
        low = y0 if y0 >= 0 and y0 - room < 0 else y0 - room  # no axis below zero for what is never negative
        few, whole = np.unique(xs).tolist(), bool((xs == np.round(xs)).all())
        shown = few if len(few) <= 6 else ticks(x0, x1, whole=whole)
        return cls(x0, x1, low, y1 + room, percent, 12.0 if len(xs) <= FEW * len(series) else 2.0, shown)

    def x(self, value: float) -> float:
        room = WIDTH - LEFT - RIGHT - 2 * self.inset
        return LEFT + self.inset + room * (value - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y0) / (self.y1 - self.y0)

    def axes(self, x_label: str) -> str:
        """Grid lines with their numbers, and the name of the x axis."""
        parts = []
        for value in ticks(self.y0, self.y1):
            y = self.y(value)
            shown = f"{100 * value:.4g} %" if self.percent else _short(value)
            parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{shown}</text>')
        last = -math.inf
        for value in self.xs:
            x = self.x(value)
            if x - last >= 24:
                parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{value:.6g}</text>')
                last = x
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
        return f'<g class="axes">{"".join(parts)}</g>'


def _widened(low: float, high: float) -> tuple[float, float]:
    """The range itself, or one around a single value."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    around = abs(low) * 0.1 or 0.5
    return low - around, high + around


def _line(frame: _Frame, series: Series, smooth: bool, aside: float) -> str:
    """The line of a series with its intervals: dots where there are few points, else its moving mean too.

    aside: pixels by which dots and intervals are moved to the right.
    """
    xs, ys = np.asarray(series.xs, float), np.asarray(series.ys, float)
    if len(xs) > FEW:
        return _path(frame, xs, ys, "faint") * smooth + _path(frame, xs, _moving_mean(ys) if smooth else ys, "thick")
    parts = [_path(frame, xs, ys, "thick")]
    for i in map(int, np.flatnonzero(np.isfinite(ys))):
        x, y, said = frame.x(xs[i]) + aside, frame.y(ys[i]), f"{series.name}, {xs[i]:g}: {number(ys[i], frame.percent)}"
        if series.low is not None and series.high is not None and np.isfinite([series.low[i], series.high[i]]).all():
            low, high = frame.y(series.low[i]), frame.y(series.high[i])
            parts.append(f'<line class="range" x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}"/>')
            said += f" ({number(series.low[i], frame.percent)} to {number(series.high[i], frame.percent)})"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>{escape(said)}</title></circle>')
    return "".join(parts)


def _path(frame: _Frame, xs: np.ndarray, ys: np.ndarray, kind: str) -> str:
    """A path that leaves out what is not finite."""
    runs = [list(run) for finite, run in groupby(range(len(ys)), key=lambda i: bool(np.isfinite(ys[i]))) if finite]
    moves = ["M" + "L".join(f"{frame.x(xs[i]):.1f} {frame.y(ys[i]):.1f}" for i in run) for run in runs]
    return f'<path class="{kind}" d="{"".join(moves)}"/>'


def _moving_mean(ys: np.ndarray) -> np.ndarray:
    """The mean of the finite values among the points around each point, a tenth of all of them."""
    half = max(2, len(ys) // 20)
    windows = [ys[max(0, i - half) : i + half + 1] for i in range(len(ys))]
    return np.array([np.mean(w[np.isfinite(w)]) if np.isfinite(w).any() else np.nan for w in windows])


def _mark(frame: _Frame, mark: Mark) -> str:
    if mark.x is not None:
        x = frame.x(mark.x)
        return f'<line class="mark" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>'
    y = frame.y(mark.y or 0.0)
    return f'<line class="mark" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'


def _value(series: Series, percent: bool) -> str:
    return f" <b>{_last(series, percent)}</b>"


def _last(series: Series, percent: bool) -> str:
    """The last value that is finite."""
    ys = np.asarray(series.ys, float)
    return number(float(ys[np.isfinite(ys)][-1]), percent)
