"""Pictures that are wrong in ways a weak or over-tuned generator produces, and the noise that the reward must ignore.

`damage` spoils a rendering: extra, doubled, cut, two-coloured, half-and-half, smeared or warped things. Whether the
result still satisfies the caption is asked of the verifier, not assumed. `augment` is what must NOT matter: light
blur, resampling, noise and shifts of a few pixels, as a decoder and the jitter of a training run add them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from flowbp_ray.shapes.combinations import COLOURS, SHAPES
from flowbp_ray.shapes.render import coverage, render
from flowbp_ray.shapes.world import CANVAS, Scene, Thing

WHOLE = slice(0, CANVAS)


def _colour(rng: np.random.Generator) -> str:
    return str(rng.choice(list(COLOURS)))


def _paint(image: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Lay an RGB colour over float image [64, 64, 3] with coverage alpha [64, 64]."""
    return image + alpha[..., None] * (colour - image)


def _cover(thing: Thing) -> np.ndarray:
    return coverage(thing.shape, thing.x, thing.y, thing.size, WHOLE, WHOLE)


def _half(rng: np.random.Generator, thing: Thing) -> np.ndarray:
    """A soft half plane [64, 64] through (or near) the thing's centre, in a random direction."""
    angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.35, 0.35) * thing.size
    grid = np.arange(CANVAS) + 0.5
    along = (grid[None] - thing.x) * np.cos(angle) + (grid[:, None] - thing.y) * np.sin(angle)
    return np.clip(along - offset + 0.5, 0.0, 1.0)


def _extra(rng: np.random.Generator, scene: Scene, image: np.ndarray) -> np.ndarray:
    """One thing too many, anywhere, whole or a blob."""
    x, y = rng.uniform(4, CANVAS - 4, 2)
    thing = Thing(str(rng.choice(SHAPES)), _colour(rng), x, y, rng.uniform(4.0, 10.0))
    alpha = _cover(thing)
    if rng.random() < 0.5:
        alpha = np.clip(ndimage.gaussian_filter(alpha, rng.uniform(0.8, 3.0)) * rng.uniform(0.6, 1.4), 0, 1)
    colour = np.array(COLOURS[thing.colour if rng.random() < 0.5 else scene.things[0].colour], float)
    return _paint(image, alpha, colour)


def _cut(rng: np.random.Generator, scene: Scene, image: np.ndarray) -> np.ndarray:
    """Part of one thing is gone."""
    thing = scene.things[rng.integers(len(scene.things))]
    alpha = np.clip(_cover(thing) * 3, 0, 1) * _half(rng, thing) * rng.uniform(0.7, 1.0)
    return _paint(image, alpha, np.array(scene.background, float))


def _two_tone(rng: np.random.Generator, scene: Scene, image: np.ndarray) -> np.ndarray:
    """One thing carries a second colour on one side, or a colour between two."""
    thing = scene.things[rng.integers(len(scene.things))]
    where = _half(rng, thing) if rng.random() < 0.6 else np.full((CANVAS, CANVAS), rng.uniform(0.4, 0.6))
    return _paint(image, _cover(thing) * where, np.array(COLOURS[_colour(rng)], float))


def _chimera(rng: np.random.Generator, scene: Scene, image: np.ndarray) -> np.ndarray:
    """One thing is half another shape, or the union of two."""
    thing = scene.things[rng.integers(len(scene.things))]
    shapes = [s for s in SHAPES if s != thing.shape]
    second = replace(thing, shape=str(rng.choice(shapes)), size=thing.size * rng.uniform(0.85, 1.15))
    half = _half(rng, thing)
    alpha = _cover(thing) * (1 - half) + _cover(second) * half
    if rng.random() < 0.4:
        alpha = np.maximum(_cover(thing), _cover(second))
    bare = render(replace(scene, things=tuple(t for t in scene.things if t is not thing))).astype(float)
    return _paint(bare, alpha, np.array(COLOURS[thing.colour], float))


def _double(rng: np.random.Generator, scene: Scene, image: np.ndarray) -> np.ndarray:
    """One thing appears twice, overlapping itself or beside itself."""
    thing = scene.things[rng.integers(len(scene.things))]
    angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 2.4) * thing.size
    ghost = replace(thing, x=thing.x + far * np.cos(angle), y=thing.y + far * np.sin(angle))
    return _paint(image, _cover(ghost) * rng.uniform(0.6, 1.0), np.array(COLOURS[thing.colour], float))


def _warp(rng: np.random.Generator, scene: Scene, image: np.ndarray) -> np.ndarray:
    """A smooth random displacement of 3 to 8 pixels."""
    field = ndimage.gaussian_filter(rng.standard_normal((2, CANVAS, CANVAS)), (0, 5, 5))
    field *= rng.uniform(2.0, 6.0) / field.std()
    grid = np.mgrid[0:CANVAS, 0:CANVAS] + field
    return np.stack([ndimage.map_coordinates(image[..., c], grid, order=1, mode="nearest") for c in range(3)], -1)


def _smear(rng: np.random.Generator, scene: Scene, image: np.ndarray) -> np.ndarray:
    """A blur strong enough to lose the outline."""
    sigma = rng.uniform(2.5, 6.0)
    return ndimage.gaussian_filter(image, (sigma, sigma, 0))


def _fade(rng: np.random.Generator, scene: Scene, image: np.ndarray) -> np.ndarray:
    """Things pale to the background, wholly or in blotches."""
    blotch = ndimage.gaussian_filter(rng.standard_normal((CANVAS, CANVAS)), rng.uniform(2, 5))
    mask = np.clip(blotch / blotch.std() + rng.uniform(-0.3, 1.0), 0, 1)
    return _paint(image, mask * rng.uniform(0.6, 1.0), np.array(scene.background, float))


KINDS = {
    "extra": _extra,
    "cut": _cut,
    "two_tone": _two_tone,
    "chimera": _chimera,
    "double": _double,
    "warp": _warp,
    "smear": _smear,
    "fade": _fade,
}


def damage(rng: np.random.Generator, scene: Scene, kind: str | None = None) -> np.ndarray:
    """A spoiled picture of the scene, uint8 [64, 64, 3]; one kind of damage, sometimes two."""
    image = render(scene).astype(float)
    kinds = [kind] if kind else [str(k) for k in rng.choice(list(KINDS), 1 + int(rng.random() < 0.2), replace=False)]
    for name in kinds:
        image = KINDS[name](rng, scene, image)
    return image.round().clip(0, 255).astype(np.uint8)


def augment(rng: np.random.Generator, images: Tensor, noise: float = 0.15, shift: int = 2) -> Tensor:
    """Images [B, 3, 64, 64] in 0..1 with light blur or resampling, noise, shifts, contrast; each row its own."""
    batch = len(images)

    def per_row(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (batch, 1, 1, 1)).astype(np.float32))

    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    softer = F.avg_pool2d(F.pad(soft, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    coarse = F.interpolate(F.interpolate(images, 32, mode="area"), 64, mode="bilinear")
    draw = torch.from_numpy(rng.integers(0, 4, (batch, 1, 1, 1)))
    blurred = torch.where(draw == 1, soft, torch.where(draw == 2, softer, torch.where(draw == 3, coarse, images)))
    images = images + per_row(0.0, 1.0) * (blurred - images)
    padded = F.pad(images, (shift,) * 4, mode="replicate")
    moves = rng.integers(0, 2 * shift + 1, (batch, 2))
    images = torch.stack(
        [p[:, y : y + CANVAS, x : x + CANVAS] for p, (y, x) in zip(padded, moves.tolist(), strict=True)]
    )
    images = (images - 0.5) * per_row(0.93, 1.05) + 0.5 + per_row(-0.03, 0.03)
    grain = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    return images + per_row(0.0, noise) * grain
