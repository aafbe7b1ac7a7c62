"""Noise and shifts on the images a reward sees while it is trained on.

A small reward model has directions that no picture uses. Looking through a slightly different window each time
averages them out (without it the reward rises while the truth falls). Each image has its own random stream, keyed by
(seed, step, sample, branch), so no split of the batch can change what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray.utils.random import stream_of_list


@dataclass(frozen=True)
class KeyedJitter:
    """Add N(0, s^2) noise, s uniform in [0, noise] per image, and shift by up to `shift` pixels (edges repeated).

    seed, step: the run's. samples: global sample index of each row of the call; None: the row's own number.
    """

    seed: int
    step: int
    noise: float = 0.1
    shift: int = 2
    samples: Sequence[int] | None = field(default=None)

    def __call__(self, images: Tensor, where: list[tuple[int, int]]) -> Tensor:
        """Jitter images [R, 3, H, W]; where names the (row, branch) of each. Differentiable in the images."""
        height, width = images.shape[-2:]
        padded = F.pad(images, (self.shift,) * 4, mode="replicate") if self.shift else images
        rows = []
        for image, (row, branch) in zip(padded, where, strict=True):
            sample = row if self.samples is None else self.samples[row]
            rng = stream_of_list("jitter", self.seed, self.step, sample, branch)
            top, left = rng.integers(0, 2 * self.shift + 1, size=2)
            level = rng.uniform(0.0, self.noise)
            grain = rng.standard_normal((images.shape[1], height, width), dtype=np.float32) * np.float32(level)
            window = image[:, top : top + height, left : left + width]
            rows.append(window + torch.from_numpy(grain).to(images))
        return torch.stack(rows)
