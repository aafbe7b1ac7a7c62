"""Rendering of scenes: each shape is a signed distance, so its edge is anti-aliased over one pixel."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .combinations import COLOURS
from .look import CLEAN, RAGGED_SCALE, STAIN_SCALE, Look, smooth_noise
from .world import CANVAS, Scene

SQUARE_HALF = 0.86
CROSS_HALF = 0.34
RING_MIDDLE, RING_HALF = 0.73, 0.27
TRIANGLE_WIDTH, TRIANGLE_BASE = 0.98, 0.76
STAR_INNER = 0.46


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, size: float) -> np.ndarray:
    """The distance to the outline in pixels, negative inside. dx, dy: pixel offsets from the centre."""
    if shape == "circle":
        return np.hypot(dx, dy) - size
    if shape == "ring":
        return np.abs(np.hypot(dx, dy) - RING_MIDDLE * size) - RING_HALF * size
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - SQUARE_HALF * size
    if shape == "cross":
        ax, ay, half = np.abs(dx), np.abs(dy), CROSS_HALF * size
        return np.minimum(np.maximum(ax - size, ay - half), np.maximum(ax - half, ay - size))
    if shape == "triangle":
        height = 1.0 + TRIANGLE_BASE  # from the apex (0, -1) to the base
        length = float(np.hypot(height, TRIANGLE_WIDTH))
        slope = (height * np.abs(dx) - TRIANGLE_WIDTH * (dy + size)) / length
        return np.maximum(dy - TRIANGLE_BASE * size, slope)
    if shape == "star":
        step = np.pi / 5
        angle = np.arctan2(dx, -dy)  # 0 is straight up
        angle = np.abs((angle + step) % (2 * step) - step)
        radius = np.hypot(dx, dy)
        tip, notch = np.array([size, 0.0]), STAR_INNER * size * np.array([np.cos(step), np.sin(step)])
        edge = notch - tip
        normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
        return (radius * np.cos(angle) - tip[0]) * normal[0] + (radius * np.sin(angle) - tip[1]) * normal[1]
    raise ValueError(f"unknown shape {shape!r}")


def coverage(
    shape: str, x: float, y: float, size: float, rows: slice, columns: slice, wobble: np.ndarray | None = None
) -> np.ndarray:
    """The share of each pixel in the window that the shape covers: float [rows, columns] in [0, 1].

    wobble: by how many pixels the outline is moved outwards at each pixel [64, 64].
    """
    dy = np.arange(rows.start, rows.stop)[:, None] + 0.5 - y
    dx = np.arange(columns.start, columns.stop)[None, :] + 0.5 - x
    distance = signed_distance(shape, dx, dy, size)
    if wobble is not None:
        distance = distance - wobble[rows, columns]
    return np.clip(0.5 - distance, 0.0, 1.0)


def window(centre: float, size: float) -> slice:
    """The range of pixels, along one axis, that a thing of this centre and radius can touch."""
    return slice(max(0, int(centre - size - 1)), min(CANVAS, int(centre + size + 3)))


def render(scene: Scene, look: Look = CLEAN) -> np.ndarray:
    """Render a scene to a picture: uint8 [64, 64, 3]. The same scene and look give the same bits."""
    image = np.empty((CANVAS, CANVAS, 3))
    image[:] = scene.background
    rng = np.random.default_rng(look.seed)
    if look.stains:
        image += look.stains * smooth_noise(rng, STAIN_SCALE)[..., None]
    wobble = look.ragged * smooth_noise(rng, RAGGED_SCALE) if look.ragged else None
    for thing in scene.things:
        rows, columns = window(thing.y, thing.size + 3 * look.ragged), window(thing.x, thing.size + 3 * look.ragged)
        alpha = coverage(thing.shape, thing.x, thing.y, thing.size, rows, columns, wobble)[..., None]
        image[rows, columns] += (
            (1 - look.fade) * alpha * (np.asarray(COLOURS[thing.colour], float) - image[rows, columns])
        )
    if look.blur:
        image = ndimage.gaussian_filter(image, (look.blur, look.blur, 0), mode="nearest")
    return image.clip(0, 255).round().astype(np.uint8)
