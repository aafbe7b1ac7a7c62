"""What several tests of rewards need."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowbp_ray.rewards.base import Reward


@pytest.fixture(scope="session")
def decoder() -> nn.Module:
    """Latents [R, 4, h, w] to images [R, 3, 2h, 2w], fp64, not within 0..1."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(8, 3, 2, 2)).double()


def refuses_what_is_no_picture(reward: Reward) -> None:
    """A uint8 picture is 0..255, not 0..1: its score would mean nothing. Nor has one picture two prompts."""
    for images in (torch.zeros(1, 3, 56, 56, dtype=torch.uint8), torch.zeros(1, 56, 56, 3)):
        with pytest.raises(ValueError, match="images must be float"):
            reward.score(images, ["a"])
    with pytest.raises(ValueError, match="needs one prompt per image, got 2 and 1"):
        reward.score(torch.zeros(2, 3, 56, 56), ["a"])
