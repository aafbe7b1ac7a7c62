"""What one optimizer step of a learner is given, at a size, and its gradient two ways: by `sweep` and by the K-graph.

States and embeddings are random instead of rolled out and encoded: neither memory nor time depends on their values,
and the surrogate pins every value to the cache, whatever is in it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.models import Models
from flowbp_ray.backbones.base import Conditioning
from flowbp_ray.backbones.guidance import trained_velocity
from flowbp_ray.surrogate import METHODS, Cache, Plan, endpoint, gather_states, gather_targets, sweep
from flowbp_ray.surrogate.trajectory import Velocity
from flowbp_ray.utils.random import stream

STEPS = 25


@dataclass(frozen=True)
class Problem:
    """`conditional` is what a learner of ours runs; `guided` has the guided velocity's value, which a K-graph needs."""

    models: Models
    conditional: Velocity
    guided: Velocity
    cache: Cache
    plans: list[Plan]
    states: Tensor
    cotangents: Tensor  # [rows, 1, ...] fp32

    def forget(self) -> None:
        """Drop the gradients."""
        self.models.transformer.zero_grad(set_to_none=True)

    def hold_gradients(self) -> None:
        """Gradients of zero, allocated: what a learner that accumulates micro-batches works with."""
        for parameter in self.models.transformer.parameters():
            parameter.grad = torch.zeros_like(parameter)


def by_sweep(p: Problem) -> None:
    """Add the parameter gradient, given the cotangent: decoder and reward live elsewhere."""
    sweep(p.conditional, p.plans, p.states, p.cotangents)


def by_graph(p: Problem, scored: bool = True) -> None:
    """Add the same gradient from one graph of all active nodes, the decoder and the reward.

    scored False: that graph ends at the target, where the cotangent is given.
    """
    target = endpoint(p.guided, p.plans, p.cache)
    scoring = p.models.scoring if scored else None
    loss = (target * p.cotangents).sum() if scoring is None else scoring.loss(target)
    loss.backward()


def problem(models: Models, rows: int, k: int, method: str = "flowbp_sparse") -> Problem:
    """A step of `method` with k active nodes on `rows` samples; everything is seeded."""
    size, backbone, device, dtype = models.size, models.backbone, models.device, models.dtype
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def text() -> Conditioning:
        config = models.transformer.config
        return {
            "prompt_embeds": random(rows, size.words, config.joint_attention_dim),
            "pooled_prompt_embeds": random(rows, config.pooled_projection_dim),
        }

    latent = backbone.latent_shape(models.pixels, models.pixels)
    sigmas = backbone.sigmas(STEPS, models.pixels, models.pixels)
    cache = Cache(sigmas, random(STEPS + 1, rows, *latent), random(STEPS, rows, *latent))
    plans = [METHODS[method](k=k).plan(sigmas, stream(0, "plan", 0))] * rows
    valued = copy.copy(backbone)
    valued.linear_guidance = False  # so that the negative branch is run, without gradient: the value is needed
    cond, negative = text(), text()
    conditional, guided = (
        trained_velocity(b, models.transformer, sigmas, cond, negative, size.guidance, detach_negative=True)
        for b in (backbone, valued)
    )
    cotangents = torch.randn(rows, 1, *latent, generator=generator).to(device) / rows
    if models.scoring is not None:
        models.hold_scoring(True)
        cotangents = models.scoring.cotangent(gather_targets(plans, cache))
    return Problem(models, conditional, guided, cache, plans, gather_states(plans, cache), cotangents)
