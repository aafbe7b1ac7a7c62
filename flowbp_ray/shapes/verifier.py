"""The exact verifier: it reads a picture back into a scene and decides whether the scene satisfies a prompt.

Reading a picture: estimate the background and take the connected components that differ from it. A component's colour
is the nearest palette entry; its shape is the template of equal area and centroid with the largest overlap. A component
without a clear shape or a single palette colour is read as `UNKNOWN`, which no claim allows. The count is strict:
anything visible that a prompt does not state makes the answer no.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import permutations

import numpy as np
from scipy import ndimage

from .combinations import COLOURS, SHAPES
from .render import coverage
from .world import CANVAS, SIZE_BOUNDARY, Claim, Part, Prompt, Scene, Thing, holds

UNKNOWN = "unknown"
VISIBLE = 48.0  # RGB distance from the background at which a pixel is seen
SPECK = 9  # components of fewer pixels are noise
COLOUR_TOLERANCE = 62.0  # RGB distance from the palette
MIN_OVERLAP = 0.80  # soft intersection over union with the template
MIN_PURITY = 0.80  # share of a thing's inner pixels that carry its colour
BACKGROUND_LEVEL = 190.0
BACKGROUND_SPREAD = 40.0

_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], float)
_PALETTE_SQUARED = (_PALETTE**2).sum(1)
_EIGHT = np.ones((3, 3), int)


def _template_moments() -> dict[str, tuple[float, float]]:
    """For each shape of radius 1: its area, and the offset of its centroid below its centre."""
    moments = {}
    for shape in SHAPES:
        scale, side = 100.0, slice(0, 240)
        cover = coverage(shape, 120.0, 120.0, scale, side, side)
        rows = np.arange(240) + 0.5
        area = cover.sum()
        moments[shape] = (area / scale**2, (float((cover.sum(1) * rows).sum() / area) - 120.0) / scale)
    return moments


_MOMENTS = _template_moments()


def _background(image: np.ndarray) -> np.ndarray | None:
    """The median colour [3] of the light grey pixels; None if they are fewer than 30 % of the picture."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    low = np.minimum(np.minimum(red, green), blue)
    high = np.maximum(np.maximum(red, green), blue)
    light = image[(low > BACKGROUND_LEVEL) & (high - low < BACKGROUND_SPREAD)]
    if len(light) < 0.3 * low.size:
        return None
    return np.partition(light, len(light) // 2, axis=0)[len(light) // 2]


def _length(vectors: np.ndarray) -> np.ndarray:
    """Euclidean length over the last axis; np.linalg.norm is slow on an axis of three."""
    return np.sqrt(np.einsum("...i,...i->...", vectors, vectors))


def _colour(pixels: np.ndarray) -> str:
    """The palette name of a component's full pixels [n, 3], or UNKNOWN if they have no common one."""
    distance = _length(np.median(pixels, axis=0) - _PALETTE)
    best = int(distance.argmin())
    if distance[best] > COLOUR_TOLERANCE:
        return UNKNOWN
    nearest = (_PALETTE_SQUARED - 2 * pixels @ _PALETTE.T).argmin(1)
    return _NAMES[best] if (nearest == best).mean() >= MIN_PURITY else UNKNOWN


def _shape(alpha: np.ndarray, rows: slice, columns: slice) -> tuple[str, float, float, float]:
    """The best template for a component's coverage [rows, columns]: (name or UNKNOWN, x, y, radius)."""
    area = alpha.sum()
    y = float((alpha.sum(1) * (np.arange(rows.start, rows.stop) + 0.5)).sum() / area)
    x = float((alpha.sum(0) * (np.arange(columns.start, columns.stop) + 0.5)).sum() / area)
    best, answer = MIN_OVERLAP, (UNKNOWN, x, y, float(np.sqrt(area / np.pi)))
    for shape, (unit_area, drop) in _MOMENTS.items():
        size = float(np.sqrt(area / unit_area))
        template = coverage(shape, x, y - drop * size, size, rows, columns)
        overlap = float(np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum())
        if overlap > best:
            best, answer = overlap, (shape, x, y - drop * size, size)
    return answer


def read(image: np.ndarray) -> Scene | None:
    """Read a picture (uint8 [64, 64, 3]) into a scene; None if it has no background."""
    pixels = np.asarray(image, float)
    background = _background(pixels)
    if background is None:
        return None
    offset = pixels - background
    seen = _length(offset) > VISIBLE
    labels, _ = ndimage.label(seen, structure=_EIGHT)
    things = []
    for index, box in enumerate(ndimage.find_objects(labels), 1):
        if (labels[box] == index).sum() < SPECK:
            continue
        rows, columns = (slice(max(0, s.start - 2), min(CANVAS, s.stop + 2)) for s in box)
        mine = labels[rows, columns] == index
        near = ndimage.binary_dilation(mine, structure=_EIGHT) & ((labels[rows, columns] == 0) | mine)
        part = offset[rows, columns]
        strength = _length(part)
        ranked = np.sort(strength[mine])
        strong = mine & (strength >= 0.8 * ranked[(4 * len(ranked)) // 5])
        colour = _colour(pixels[rows, columns][strong])
        full = np.median(part[strong], axis=0)
        alpha = np.clip(part @ full / (full @ full), 0.0, 1.0) * near
        shape, x, y, size = _shape(alpha, rows, columns)
        things.append(Thing(shape, colour, x, y, size))
    red, green, blue = (int(value) for value in background)
    return Scene(tuple(things), (red, green, blue))


def _fits(thing: Thing, part: Part) -> bool:
    if thing.shape != part.shape or thing.colour == UNKNOWN or (part.colour not in (None, thing.colour)):
        return False
    return part.size is None or (part.size == "large") == (thing.size > SIZE_BOUNDARY)


def satisfies(scene: Scene, claim: Claim) -> bool:
    """Whether a scene shows exactly what the claim states and nothing else."""
    wanted = [part for part in claim.parts for _ in range(part.count)]
    if len(scene.things) != len(wanted):
        return False
    if len(claim.parts) == 1:
        return all(_fits(thing, claim.parts[0]) for thing in scene.things)
    for order in permutations(scene.things):
        if all(_fits(thing, part) for thing, part in zip(order, wanted, strict=True)):
            return claim.relation is None or holds(claim.relation, order[0], order[claim.parts[0].count])
    return False


def verify(image: np.ndarray, prompt: Prompt | Claim) -> bool:
    """Whether the picture (uint8 [64, 64, 3]) shows exactly what the prompt states."""
    scene = read(image)
    return scene is not None and satisfies(scene, prompt.claim if isinstance(prompt, Prompt) else prompt)


def colour_entropy(images: Iterable[np.ndarray], prompts: Iterable[Prompt]) -> float:
    """Entropy in bits (at most 3) of the colours in pictures whose prompts state none; NaN if there are none."""
    counts: Counter[str] = Counter()
    for image, prompt in zip(images, prompts, strict=True):
        scene = read(image) if prompt.claim.colour_free else None
        if scene is not None:
            counts.update(thing.colour for thing in scene.things if thing.colour != UNKNOWN)
    total = sum(counts.values())
    if total == 0:
        return float("nan")
    share = np.array(list(counts.values())) / total
    return float(-(share * np.log2(share)).sum())
