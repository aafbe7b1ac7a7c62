"""The exact verifier: it reads a picture back into a scene and decides whether the scene satisfies a prompt.

Reading a picture: estimate the background and take the connected components that differ from it. A component's colour
is the nearest palette entry; its shape is the template of equal area and centroid with the largest overlap. A component
without a clear shape or a single palette colour is read as `UNKNOWN`, which no claim allows. The count is strict:
anything visible that a prompt does not state makes the answer no.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
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
FADED = 0.55  # the most that a colour may be faded and still be read
MIN_OVERLAP = 0.80  # soft intersection over union with the template
MIN_PURITY = 0.80  # share of a thing's inner pixels that carry its colour
BACKGROUND_LEVEL = 190.0
BACKGROUND_SPREAD = 40.0

_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], float)
_EIGHT = np.ones((3, 3), int)

Box = tuple[slice, slice]


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


def _to_palette(offsets: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Distances [n, 8] of pixels [n, 3], given as offsets from the background, to each colour, vivid or faded.

    A colour that is faded by f lies 1 - f of the way from the background to the palette's, so a colour is a segment.
    """
    full = _PALETTE - background
    along = np.clip(offsets @ full.T / (full**2).sum(1), 1 - FADED, 1.0)
    return _length(offsets[:, None] - along[..., None] * full)


def _colour(offsets: np.ndarray, background: np.ndarray) -> str:
    """The palette name of a component's full pixels [n, 3], less the background; UNKNOWN if they have no common one."""
    distance = _to_palette(np.median(offsets, axis=0)[None], background)[0]
    best = int(distance.argmin())
    if distance[best] > COLOUR_TOLERANCE:
        return UNKNOWN
    nearest = _to_palette(offsets, background).argmin(1)
    return _NAMES[best] if (nearest == best).mean() >= MIN_PURITY else UNKNOWN


@dataclass(frozen=True)
class Outline:
    """A visible component: the thing it is read as, its coverage and the best template's [rows, columns], its colour.

    colour: the median RGB [3] of its full pixels. thing.shape and thing.colour may be UNKNOWN.
    """

    thing: Thing
    alpha: np.ndarray
    template: np.ndarray
    colour: np.ndarray


@dataclass(frozen=True)
class Reading:
    """What is seen in a picture: the background's RGB [3], where something else is (bool [64, 64]), its components."""

    background: np.ndarray
    seen: np.ndarray
    outlines: tuple[Outline, ...]


def _shape(alpha: np.ndarray, rows: slice, columns: slice) -> tuple[str, float, float, float, np.ndarray]:
    """The best template for a component's coverage [rows, columns]: (name or UNKNOWN, x, y, radius, its coverage)."""
    area = alpha.sum()
    y = float((alpha.sum(1) * (np.arange(rows.start, rows.stop) + 0.5)).sum() / area)
    x = float((alpha.sum(0) * (np.arange(columns.start, columns.stop) + 0.5)).sum() / area)
    found = []
    for shape, (unit_area, drop) in _MOMENTS.items():
        size = float(np.sqrt(area / unit_area))
        template = coverage(shape, x, y - drop * size, size, rows, columns)
        overlap = float(np.minimum(alpha, template).sum() / np.maximum(alpha, template).sum())
        found.append((overlap, shape, y - drop * size, size, template))
    overlap, shape, middle, size, template = max(found, key=lambda one: one[0])
    if overlap <= MIN_OVERLAP:
        return UNKNOWN, x, y, float(np.sqrt(area / np.pi)), template
    return shape, x, middle, size, template


def _outline(pixels: np.ndarray, background: np.ndarray, mine: np.ndarray, near: np.ndarray, box: Box) -> Outline:
    """Read one component. mine, near: its pixels, and those with its edge, in the window `box`."""
    part = pixels[box] - background
    strength = _length(part)
    ranked = np.sort(strength[mine])
    strong = mine & (strength >= 0.8 * ranked[(4 * len(ranked)) // 5])
    full = np.median(part[strong], axis=0)
    alpha = np.clip(part @ full / (full @ full), 0.0, 1.0) * near
    shape, x, y, size, template = _shape(alpha, *box)
    return Outline(Thing(shape, _colour(part[strong], background), x, y, size), alpha, template, full + background)


def examine(image: np.ndarray) -> Reading | None:
    """What is seen in a picture (uint8 [64, 64, 3]); None if it has no background."""
    pixels = np.asarray(image, float)
    background = _background(pixels)
    if background is None:
        return None
    seen = _length(pixels - background) > VISIBLE
    labels, _ = ndimage.label(seen, structure=_EIGHT)
    outlines = []
    for index, found in enumerate(ndimage.find_objects(labels), 1):
        if (labels[found] == index).sum() < SPECK:
            continue
        rows, columns = (slice(max(0, s.start - 2), min(CANVAS, s.stop + 2)) for s in found)
        box = (rows, columns)
        mine = labels[box] == index
        near = ndimage.binary_dilation(mine, structure=_EIGHT) & ((labels[box] == 0) | mine)
        outlines.append(_outline(pixels, background, mine, near, box))
    return Reading(background, seen, tuple(outlines))


def read(image: np.ndarray) -> Scene | None:
    """Read a picture (uint8 [64, 64, 3]) into a scene; None if it has no background."""
    reading = examine(image)
    if reading is None:
        return None
    red, green, blue = (int(value) for value in reading.background)
    return Scene(tuple(outline.thing for outline in reading.outlines), (red, green, blue))


def palette_distance(colour: np.ndarray) -> float:
    """RGB distance of a colour [3] from the nearest of the palette."""
    return float(_length(colour - _PALETTE).min())


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
