"""The look of a picture, which no caption mentions: sharp, vivid and clean, or spoiled in up to four ways.

What people prefer in a picture is mostly not in its prompt. Here the same scene may be drawn well or badly, as pictures
from the web are, and captions never say so; guidance by the caption can therefore not ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .world import CANVAS

WORST = {"blur": 1.1, "fade": 0.45, "ragged": 0.5, "stains": 9.0}
GOOD_SHARE = 0.2  # of the training scenes are drawn without any fault
STAIN_SCALE, RAGGED_SCALE = 5.0, 1.6  # standard deviations of the noises' filters, in pixels


@dataclass(frozen=True)
class Look:
    """How a scene is drawn.

    blur: standard deviation of a Gaussian in pixels. fade: share by which colours go towards the background. ragged and
    stains: standard deviations of what moves outlines (pixels) and of blots on the background (of 255). seed: of the
    noises.
    """

    blur: float = 0.0
    fade: float = 0.0
    ragged: float = 0.0
    stains: float = 0.0
    seed: int = 0


CLEAN = Look()


def smooth_noise(rng: np.random.Generator, scale: float) -> np.ndarray:
    """Gaussian noise [64, 64] of mean 0 and standard deviation 1, smooth over `scale` pixels."""
    noise = ndimage.gaussian_filter(rng.standard_normal((CANVAS, CANVAS)), scale, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def sample_look(rng: np.random.Generator) -> Look:
    """A fifth of the pictures are clean; the others have each fault with probability one half, and one at least."""
    if rng.random() < GOOD_SHARE:
        return CLEAN
    names = list(WORST)
    has = rng.random(len(names)) < 0.5
    has[rng.integers(len(names))] = True
    strength = rng.uniform(0.4, 1.0, len(names))
    faults = {name: WORST[name] * float(s) for name, s, h in zip(names, strength, has, strict=True) if h}
    return Look(**faults, seed=int(rng.integers(2**31)))
