"""The largest request to a reward server, and the largest answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Packed
from flowbp_ray.rewards.remote.codec import HEADER_LIMIT


@dataclass(frozen=True)
class ServerLimits:
    """What a server takes at most: rows of one request, bytes of its body, requests that wait while one is scored."""

    rows: int
    nbytes: int
    waiting: int

    @classmethod
    def of(cls, config: RunConfig, rows: int | None = None, waiting: int = 8) -> ServerLimits:
        """rows None: those of an item of the run, or of its evaluation. The bytes follow: fp32 targets and a header."""
        rows = rows or max(config.data.rollout_batch, config.evaluation.batch)
        latents = rows * config.surrogate().branches * math.prod(latent_shape(config))
        return cls(rows, 4 * latents + 8 + HEADER_LIMIT, waiting)


def latent_shape(config: RunConfig) -> tuple[int, ...]:
    """The shape of one latent, without the batch."""
    return tuple(build_backbone(config.backbone).latent_shape(config.backbone.height, config.backbone.width))


def cotangent_shape(config: RunConfig, target: Packed) -> tuple[int, ...]:
    """The shape of the cotangent of target [rows, branches, ...]: the same, with `rewards.balance` once per term.

    [rows, 0] where no term has a gradient.
    """
    shape = tuple(target.array.shape)
    if not config.rewards.differentiable:
        return (shape[0], 0)
    return shape if config.rewards.balance == "none" else (len(config.rewards.differentiable), *shape)


def largest_score(config: RunConfig, target: Packed) -> int:
    """Bytes of the largest answer to a /score."""
    return 8 + HEADER_LIMIT + 4 * math.prod(cotangent_shape(config, target))


def images_shape(config: RunConfig, rows: int) -> tuple[int, ...]:
    """The shape of the pictures of an evaluation's item."""
    return (rows, config.backbone.height, config.backbone.width, 3)


def largest_evaluation(config: RunConfig, rows: int) -> int:
    """Bytes of the largest answer to an /evaluate."""
    return 8 + HEADER_LIMIT + math.prod(images_shape(config, rows))
