"""How much one request to a reward server may hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowbp_ray.config import RunConfig
from flowbp_ray.remote.codec import HEADER_LIMIT


@dataclass(frozen=True)
class Limits:
    """rows of one request, bytes of its body, requests that wait while one is scored."""

    rows: int
    nbytes: int
    waiting: int

    @classmethod
    def of(cls, config: RunConfig, rows: int | None = None, waiting: int = 8) -> Limits:
        """rows None: those of an item of the run, or of its evaluation. The bytes follow: fp32 targets and a header."""
        rows = rows or max(config.data.rollout_batch, config.evaluation.batch)
        latents = rows * config.surrogate().branches * math.prod(latent_shape(config))
        return cls(rows, 4 * latents + 8 + HEADER_LIMIT, waiting)


def latent_shape(config: RunConfig) -> tuple[int, ...]:
    """Of one latent, without the batch."""
    return tuple(config.backbone.open().latent_shape(config.backbone.height, config.backbone.width))
