"""A judge's score that can be computed without a judge: how bright a picture is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowbp_ray.backbones.base import uint8_images
from tests.judges.fake import picture_of, said


def brightness(picture: np.ndarray) -> float:
    """1 to 5, a multiple of 1/4096, which a decimal of a few digits and an fp32 number hold exactly."""
    return round((1 + 4 * float(picture.mean()) / 255) * 4096) / 4096


def answer(body: dict[str, Any], before: int = 0) -> tuple[int, Any]:
    """The answer of the stand-in."""
    return 200, said(f"Final Score: {brightness(picture_of(body)):.12f}")


class Bright:
    """The same number as a reward of one's own, without gradient."""

    differentiable = False

    def __init__(self, device: str = "cpu") -> None:
        self.name, self.device = "eye", device

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([brightness(picture) for picture in uint8_images(images.detach())])
