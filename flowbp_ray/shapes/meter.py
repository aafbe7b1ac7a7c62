"""The exact quality meter: how well a picture is drawn, whatever it shows, read without any network.

Three marks between 0 and 1, and their mean: *edges* (how far outlines are from those of the ideal shapes, by blur or
by raggedness), *colours* (how far they are from the palette) and *background* (how uneven it is). Nothing is trained
on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .verifier import Reading, examine, palette_distance

EDGE = (
    0.22,
    0.62,
)  # mean distance of an outline from the ideal one, in pixels: full mark at the first, none at the second
COLOUR = (15.0, 80.0)  # RGB distance of the things' colours from the palette, of 255
BACKGROUND = (1.2, 6.0)  # standard deviation of the background, of 255
MARGIN = 3  # pixels around a thing that do not count as background


@dataclass(frozen=True)
class Quality:
    """The three marks of a picture, each in [0, 1]."""

    edges: float
    colours: float
    background: float

    @property
    def mean(self) -> float:
        return (self.edges + self.colours + self.background) / 3


NONE = Quality(0.0, 0.0, 0.0)


def _mark(value: float, bounds: tuple[float, float]) -> float:
    """1 up to the first bound, 0 from the second, linear between."""
    return float(np.clip((bounds[1] - value) / (bounds[1] - bounds[0]), 0.0, 1.0))


def quality(image: np.ndarray) -> Quality:
    """Read a picture (uint8 [64, 64, 3]); without a background or without things all marks are 0."""
    reading = examine(image)
    if reading is None or not reading.outlines:
        return NONE
    return Quality(
        _mark(_edge_error(reading), EDGE),
        _mark(float(np.mean([palette_distance(outline.colour) for outline in reading.outlines])), COLOUR),
        _mark(_unevenness(np.asarray(image, float), reading), BACKGROUND),
    )


def _edge_error(reading: Reading) -> float:
    """Mean distance of the outlines from those of the best templates, in pixels.

    The area between two outlines over their length; a template t that is anti-aliased over one pixel has the length
    6 * sum t (1 - t), because the integral of t (1 - t) across its edge is 1/6.
    """
    between = sum(float(np.abs(o.alpha - o.template).sum()) for o in reading.outlines)
    length = sum(6 * float((o.template * (1 - o.template)).sum()) for o in reading.outlines)
    return between / length


def _unevenness(pixels: np.ndarray, reading: Reading) -> float:
    """Standard deviation of the background's brightness, away from the things."""
    far = ~ndimage.binary_dilation(reading.seen, iterations=MARGIN)
    if far.sum() < 50:
        return BACKGROUND[1]
    return float(pixels[far].mean(-1).std())
