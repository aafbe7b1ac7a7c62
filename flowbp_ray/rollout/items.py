"""The items of a step, their plans and their noise: pure functions of seed and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flowbp_ray import prompts
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.data import DataConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Item, Version
from flowbp_ray.surrogate import Method, Plan
from flowbp_ray.utils import random


def plans_of_step(method: Method, sigmas: Tensor, seed: int, step: int, rows: int) -> tuple[Plan, ...]:
    """One plan per row of the batch, drawn once per step or once per row (`method.draws`).

    The random streams are keyed by (seed, step), or by (seed, step, row).
    """
    if method.draws == "per_batch":
        return (method.plan(sigmas, random.stream(seed, "plan", step)),) * rows
    return tuple(method.plan(sigmas, random.stream(seed, "plan", step, row)) for row in range(rows))


@dataclass(frozen=True)
class ItemSource:
    """The training items of a run, step by step.

    sigmas: the grid [N+1] of the rollouts. prompt_count: the number of training prompts. seed: for prompts and noise.
    plan_seed: for the draws of the method. times: nodes at which a sample is noised again (see `surrogate.nft`).
    weights: of the training prompts, if some are drawn more often.
    """

    data: DataConfig
    method: Method
    sigmas: Tensor
    prompt_count: int
    guidance: float
    seed: int
    plan_seed: int
    times: int = 0
    weights: tuple[float, ...] = ()

    def of_step(self, step: int, version: Version) -> list[Item]:
        """The items of a step, in order. The images of one prompt are adjacent rows."""
        shape = self.data.shape
        ids = prompts.ids_of_step(self.prompt_count, shape.prompts_per_step, step, self.seed, self.weights)
        rows = [prompt for prompt in ids for _ in range(shape.images_per_prompt)]
        plans = plans_of_step(self.method, self.sigmas, self.plan_seed, step, len(rows))
        times = [self._times(step, row) for row in range(len(rows))] if self.times else []
        items = []
        for index in range(shape.items):
            part = range(index * shape.rollout_batch, (index + 1) * shape.rollout_batch)
            items.append(
                Item(
                    purpose="train",
                    step=step,
                    index=index,
                    prompt_ids=tuple(rows[i] for i in part),
                    samples=tuple(part),
                    plans=tuple(plans[i] for i in part),
                    seed=self.seed,
                    num_steps=len(self.sigmas) - 1,
                    guidance=self.guidance,
                    version=version,
                    times=tuple(times[i] for i in part) if times else (),
                )
            )
        return items

    def _times(self, step: int, row: int) -> tuple[int, ...]:
        """Distinct nodes, drawn uniformly from the stream of (seed, step, row), in order."""
        drawn = random.stream(self.plan_seed, "times", step, row).choice(
            len(self.sigmas) - 1, self.times, replace=False
        )
        return tuple(sorted(int(node) for node in drawn))


def noise_of(item: Item, latent_shape: Sequence[int]) -> Tensor:
    """The initial noise [rows, ...], fp32. An evaluation uses step 0 of its own seed, so its noise never changes."""
    step = item.step if item.plans else 0
    return random.normal(tuple(latent_shape), item.seed, "noise", step, item.samples)


def build_items(config: RunConfig, prompt_count: int, weights: tuple[float, ...] = ()) -> ItemSource:
    """Build the source of training items of a run with `prompt_count` training prompts and their weights."""
    model = config.backbone
    sigmas = build_backbone(model).sigmas(model.num_steps, model.height, model.width)
    method, seeds = config.surrogate(), (config.seed, config.plan_seed)
    times = config.nft.times if config.rewards.scored else 0
    return ItemSource(config.data, method, sigmas, prompt_count, model.guidance, *seeds, times, weights)
