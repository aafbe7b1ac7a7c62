"""From images to what an image tower or a detector reads, as tensors: resize, crop or pad, blur, normalise.

There are two ways to resize. Both are Pillow's filters, and they differ on purpose:

- `resize`, for rewards that are trained on. Pillow's resize is linear in the pixels and separable, so it is two small
  matrix products, 3e-7 from Pillow in fp32, with a backward that is deterministic. Nothing is clamped: an overshoot of
  the cubic stays outside 0..1, as in Pillow's mode F, since a clamp would stop its gradient.
- `resize_clamped`, for metrics without a gradient: `torch.nn.functional.interpolate` with antialiasing, and clamping
  gives what Pillow makes of 8-bit pictures, up to their rounding. Its weights are rounded (1e-5 from Pillow), and its
  backward has no deterministic kernel on GPUs (`cluster.deterministic` would refuse it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray.utils.text_files import read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per channel, of what OpenAI's CLIP was trained on (its released code); all rewards of this kind use them."""

FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as preprocessor_config.json has them
Middle = Literal["down", "even"]
Resize = Callable[[Tensor, int, int, str], Tensor]  # an image, height, width and filter -> the image


def preprocessor_config(folder: Path) -> dict[str, Any]:
    """A model's preprocessor_config.json. Raises ValueError where there is none."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no preprocessor_config.json; download it beside the model's config.json")
    return read_json(path, str(path))


def clip_pixels(images: Tensor, size: int, middle: Middle = "down") -> Tensor:
    """Shortest side to `size` (the other one rounded down), crop size x size from the middle, normalise.

    images: [B, 3, H, W] in 0..1, any H and W. Returns [B, 3, size, size], fp32 or wider.
    middle: where an odd number of pixels is cropped: "down" as transformers do (the smaller half before), "even" as
    torchvision and with it OpenAI's and BLIP's code do (the half rounded to the even number). Differs by one pixel, and
    only for images that are not square.
    """
    images = precise(images)
    return normalise(_middle(resize(images, *_shorter_side(images, size)), size, middle))


def clip_square(image: Tensor, size: int) -> Tensor:
    """The same square of image [3, H, W] as 8-bit CLIP code sees it, not normalised: [3, size, size] in 0..1.

    That is `clip_pixels` with middle="even" and `resize_clamped`.
    """
    return _middle(resize_clamped(image, *_shorter_side(image, size), "bicubic"), size, "even")


def _shorter_side(images: Tensor, size: int) -> tuple[int, int]:
    """Height and width of images [..., H, W] scaled to `size` at the shorter side, the other one rounded down."""
    height, width = images.shape[-2:]
    short = min(height, width)
    return int(size * height / short), int(size * width / short)


def _middle(images: Tensor, size: int, middle: Middle) -> Tensor:
    """The middle [..., size, size] of images [..., H, W]; `middle` as in `clip_pixels`."""
    over = (side - size for side in images.shape[-2:])
    top, left = (d // 2 if middle == "down" else round(d / 2) for d in over)
    return images[..., top : top + size, left : left + size]


def padded_pixels(images: Tensor, size: int) -> Tensor:
    """Longest side to `size` (the other one to the nearest), black around it (less of it before), normalise.

    images: [B, 3, H, W] in 0..1, any H and W. Returns [B, 3, size, size], fp32 or wider. The border is zero before it
    is normalised. This is how HPSv2 reads images (`ResizeMaxSize` in github.com/tgxs002/HPSv2; on an image whose
    longest side is `size` already that code forgets to pad, and cannot go on).
    """
    images = precise(images)
    scale = size / max(images.shape[-2:])
    tall, wide = (max(1, round(side * scale)) for side in images.shape[-2:])
    down, right = size - tall, size - wide
    images = F.pad(resize(images, tall, wide), (right // 2, right - right // 2, down // 2, down - down // 2))
    return normalise(images)


def resize(images: Tensor, height: int, width: int, how: str = "bicubic") -> Tensor:
    """Pillow's resize of images [..., H, W] to [..., height, width]; fp32 or fp64, differentiable, no clamp.

    how: see `FILTERS`.
    """
    if images.shape[-1] != width:
        images = images @ _weights(images.shape[-1], width, how).to(images).mT
    if images.shape[-2] != height:
        images = _weights(images.shape[-2], height, how).to(images) @ images
    return images


def resize_clamped(image: Tensor, height: int, width: int, how: str = "bilinear") -> Tensor:
    """image [3, H, W] in 0..1 -> [3, height, width] in 0..1, as Pillow resizes 8-bit pictures. how: see `FILTERS`."""
    if image.shape[-2:] == (height, width):
        return image
    out = F.interpolate(image[None], (height, width), mode=how, align_corners=False, antialias=True)[0]
    return out.clamp(0.0, 1.0)


def normalise(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(images - mean) / std per channel, of images [..., 3, H, W]."""
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


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


def blur(image: Tensor, sigma: tuple[float, float]) -> Tensor:
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


def precise(images: Tensor) -> Tensor:
    """Images as fp32, or as they are where they are wider: a picture has more levels than bfloat16 between 0 and 1."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float [B, 3, H, W] in 0..1, got {images.dtype} {tuple(images.shape)}")
    return images.to(torch.promote_types(images.dtype, torch.float32))


@lru_cache(maxsize=64)
def _weights(old: int, new: int, how: str = "bicubic") -> Tensor:
    """Row i says how output pixel i is made from the `old` pixels of a line; fp64 [new, old], each row sums to 1.

    With s = old / new and f = max(s, 1), pixel p weighs w((p + 1/2 - s (i + 1/2)) / f): the filter is stretched when
    shrinking, and cut off at the border of the image (Pillow, Resample.c). w is Keys' cubic (1981) with a = -1/2, or
    for "bilinear" the triangle 1 - |x|.
    """
    step = old / new
    stretch = max(step, 1.0)
    centres = step * (torch.arange(new, dtype=torch.float64)[:, None] + 0.5)
    away = ((torch.arange(old, dtype=torch.float64) + 0.5 - centres) / stretch).abs()
    if how == "bilinear":
        weights = (1 - away).clamp(min=0.0)
        return weights / weights.sum(1, keepdim=True)
    near = 1.5 * away**3 - 2.5 * away**2 + 1
    far = -0.5 * away**3 + 2.5 * away**2 - 4 * away + 2
    weights = torch.where(away < 1, near, torch.where(away < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)
