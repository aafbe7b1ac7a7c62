"""From images to what a CLIP-like tower reads, on tensors: resize, crop or pad, normalise. All of it differentiable.

Pillow's bicubic resize is linear in the pixels and separable, so it is two small matrix products here, 3e-7 from Pillow
in fp32. `torch.nn.functional.interpolate(mode="bicubic", antialias=True)` is the same map, but its weights are rounded
(1e-5 from Pillow) and its backward has no deterministic kernel on GPUs (`cluster.deterministic` would refuse it).
Nothing is clamped: an overshoot of the cubic stays outside 0..1, as in Pillow's mode F; pictures that went through 8
bits differ by their rounding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per channel, of what OpenAI's CLIP was trained on (its released code); all rewards of this kind use them."""

Middle = Literal["down", "even"]


def clip_pixels(images: Tensor, size: int, middle: Middle = "down") -> Tensor:
    """Shortest side to `size` (the other one rounded down), crop size x size from the middle, normalise.

    images: [B, 3, H, W] in 0..1, any H and W. Returns [B, 3, size, size], fp32 or wider.
    middle: where an odd number of pixels is cropped: "down" as transformers do (the smaller half before), "even" as
    torchvision and with it OpenAI's and BLIP's code do (the half rounded to the even number). Differs by one pixel, and
    only for images that are not square.
    """
    images = precise(images)
    height, width = images.shape[-2:]
    short = min(height, width)
    tall, wide = int(size * height / short), int(size * width / short)
    images = resize(images, tall, wide)
    top, left = (d // 2 if middle == "down" else round(d / 2) for d in (tall - size, wide - size))
    return normalise(images[..., top : top + size, left : left + size])


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


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Pillow's bicubic resize of images [..., H, W] to [..., height, width]; fp32 or fp64, no clamp."""
    if images.shape[-1] != width:
        images = images @ _weights(images.shape[-1], width).to(images).mT
    if images.shape[-2] != height:
        images = _weights(images.shape[-2], height).to(images) @ images
    return images


def normalise(images: Tensor) -> Tensor:
    """(images - mean) / std per channel, of images [B, 3, H, W]."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def precise(images: Tensor) -> Tensor:
    """Images as fp32, or as they are where they are wider: a picture has more levels than bfloat16 between 0 and 1."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float [B, 3, H, W] in 0..1, got {images.dtype} {tuple(images.shape)}")
    return images.to(torch.promote_types(images.dtype, torch.float32))


@lru_cache(maxsize=64)
def _weights(old: int, new: int) -> Tensor:
    """Row i says how output pixel i is made from the `old` pixels of a line; fp64 [new, old], each row sums to 1.

    With s = old / new and f = max(s, 1), pixel p weighs w((p + 1/2 - s (i + 1/2)) / f): the cubic is stretched when
    shrinking, and cut off at the border of the image (Pillow, Resample.c). w is Keys' cubic (1981) with a = -1/2.
    """
    step = old / new
    stretch = max(step, 1.0)
    centres = step * (torch.arange(new, dtype=torch.float64)[:, None] + 0.5)
    away = ((torch.arange(old, dtype=torch.float64) + 0.5 - centres) / stretch).abs()
    near = 1.5 * away**3 - 2.5 * away**2 + 1
    far = -0.5 * away**3 + 2.5 * away**2 - 4 * away + 2
    weights = torch.where(away < 1, near, torch.where(away < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)
