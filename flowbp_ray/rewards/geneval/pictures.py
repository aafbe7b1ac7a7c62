"""Pictures as tensors on their way into a detector or CLIP: resizing and normalising, without PIL or torchvision.

Bilinear and bicubic with antialiasing are PIL's filters (Catmull-Rom for bicubic), so what comes out is what the
published preprocessing gives, up to its rounding to 8 bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as preprocessor_config.json has them


def settings(folder: Path) -> dict[str, Any]:
    """A model's preprocessor_config.json. Raises ValueError where there is none."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no preprocessor_config.json; download it beside the model's config.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def resized(image: Tensor, height: int, width: int, how: str = "bilinear") -> Tensor:
    """image [3, H, W] in 0..1 -> [3, height, width] in 0..1, as PIL resizes (bicubic overshoots are cut off)."""
    if image.shape[-2:] == (height, width):
        return image
    out = F.interpolate(image[None], (height, width), mode=how, align_corners=False, antialias=True)[0]
    return out.clamp(0.0, 1.0)


def normalised(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(image − mean) / std per channel."""
    return (image - image.new_tensor(mean).view(3, 1, 1)) / image.new_tensor(std).view(3, 1, 1)


def centre_cropped(image: Tensor, size: int) -> Tensor:
    """Shorter side to `size`, bicubic, then the middle [3, size, size]: CLIP's own transform (arXiv 2103.00020)."""
    height, width = image.shape[-2:]
    if height <= width:
        height, width = size, int(size * width / height)
    else:
        height, width = int(size * height / width), size
    image = resized(image, height, width, "bicubic")
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[:, top : top + size, left : left + size]


def shortest_edge(height: int, width: int, shortest: int, longest: int | None) -> tuple[int, int]:
    """(height, width) with the shorter side at `shortest`, or less where the longer one would pass `longest`."""
    short, long = min(height, width), max(height, width)
    exact = float(shortest)
    if longest is not None and long / short * shortest > longest:
        exact = longest * short / long
        shortest = round(exact)
    other = int(exact * long / short)
    if short == shortest:
        other = long
    return (shortest, other) if height <= width else (other, shortest)


def divisible(height: int, width: int, divisor: int) -> tuple[int, int]:
    """Both sides rounded up to a multiple of `divisor`; 0 leaves them."""
    if not divisor:
        return height, width
    return math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor


def blurred(image: Tensor, sigma: tuple[float, float]) -> Tensor:
    """Gaussian blur of [3, H, W] with a standard deviation per axis (down, across), cut at 4 of them, mirrored."""
    out = image[None]
    for axis, deviation in enumerate(sigma):
        if deviation <= 0:
            continue
        radius = int(4 * deviation + 0.5)
        steps = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
        weights = torch.exp(-0.5 * (steps / deviation) ** 2)
        weights = weights / weights.sum()
        kernel = weights.view((1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1)).repeat(3, 1, 1, 1)
        edges = (0, 0, radius, radius) if axis == 0 else (radius, radius, 0, 0)
        out = F.conv2d(F.pad(out, edges, mode="reflect"), kernel, groups=3)
    return out[0]
