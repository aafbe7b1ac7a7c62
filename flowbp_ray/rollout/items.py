"""The items of a step, their plans and their noise: pure functions of seed and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from flowbp_ray import prompts
from flowbp_ray.config.sections import BatchShape
from flowbp_ray.messages import Item, Version
from flowbp_ray.surrogate import (
    Method,
    Plan,
)
from flowbp_ray.utils import random

if TYPE_CHECKING:
    from flowbp_ray.config.schema import RunConfig


def plans_of_step(method: Method, sigmas: Tensor, seed: int, step: int, rows: int) -> tuple[Plan, ...]:
    """One plan per row of the batch: the same one drawn per step, or its own per sample. Keyed by (seed, step, row)."""
    if method.draws == "per_batch":
        return (method.plan(sigmas, random.stream(seed, "plan", step)),) * rows
    return tuple(method.plan(sigmas, random.stream(seed, "plan", step, row)) for row in range(rows))


def items_of_run(
    config: RunConfig, method: Method, sigmas: Tensor, prompt_count: int, step: int, version: Version
) -> list[Item]:
    """The items of a step as a run's configuration has them."""
    shape, guidance = config.data.shape, config.backbone.guidance
    return items_of_step(method, sigmas, shape, prompt_count, config.seed, step, guidance, version, config.plan_seed)


def items_of_step(
    method: Method,
    sigmas: Tensor,
    shape: BatchShape,
    prompt_count: int,
    seed: int,
    step: int,
    guidance: float,
    version: Version,
    plan_seed: int,
) -> list[Item]:
    """The items of a step, in order. A prompt's images stand side by side."""
    ids = prompts.ids_of_step(prompt_count, shape.prompts_per_step, step, seed)
    rows = [prompt for prompt in ids for _ in range(shape.images_per_prompt)]
    plans = plans_of_step(method, sigmas, plan_seed, step, len(rows))
    size, items = shape.rollout_batch, []
    for index in range(shape.items):
        part = range(index * size, (index + 1) * size)
        items.append(
            Item(
                purpose="train",
                step=step,
                index=index,
                prompt_ids=tuple(rows[i] for i in part),
                samples=tuple(part),
                plans=tuple(plans[i] for i in part),
                seed=seed,
                num_steps=len(sigmas) - 1,
                guidance=guidance,
                version=version,
            )
        )
    return items


def noise_of(item: Item, latent_shape: Sequence[int]) -> Tensor:
    """The starting latents [rows, ...], fp32. An evaluation uses step 0 of its own seed: the same noise every time."""
    step = item.step if item.plans else 0
    return random.normal(tuple(latent_shape), item.seed, "noise", step, item.samples)
