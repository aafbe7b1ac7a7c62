"""What several tests of rewards need."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def decoder() -> nn.Module:
    """Latents [R, 4, h, w] to images [R, 3, 2h, 2w], fp64, not within 0..1."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(8, 3, 2, 2)).double()
