"""Images in 0..1 to what the published encoders see, on tensors, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """Shortest side to `size` (bicubic, antialiased), centre crop, CLIP mean and std: [B, 3, size, size].

    images: [B, 3, H, W], values in 0..1. The long side is cut to whole pixels and the crop starts at the rounded half
    of what is left over, as torchvision's Resize and CenterCrop do, which the published code of these rewards calls.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    wanted = (int(size * height / short), int(size * width / short))
    if wanted != (height, width):
        images = F.interpolate(images, wanted, mode="bicubic", antialias=True, align_corners=False)
    top, left = round((wanted[0] - size) / 2.0), round((wanted[1] - size) / 2.0)
    mean, std = (torch.tensor(v, device=images.device, dtype=images.dtype).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images[..., top : top + size, left : left + size] - mean) / std
