"""Bytes that travel between processes and wait in the object store (docs/architecture.md), before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import Costs, noised_times
from flowbp_ray.planning.encoding import most_held
from flowbp_ray.planning.memory import FP32, Sizes, latent_bytes, prompt_bytes
from flowbp_ray.planning.work import swept


@dataclass(frozen=True)
class Traffic:
    """Bytes that travel and wait. Those of an image are the most that any draw of the method gives."""

    states: int
    """Bytes of an image's active states, from sampler to learner."""
    targets: int
    """Bytes of an image's targets, from sampler to reward server."""
    cotangents: int
    """Bytes of an image's cotangents, from reward server to learner."""
    velocities: int
    """Bytes of an image's velocities for the drift meter."""
    base: int
    """Bytes of an image's velocities of the base model."""
    forward: int
    """Bytes of an image's finished sample and of the old policy's velocities, for terms without gradient."""
    per_image: int
    """Bytes of all of these together."""
    images: int
    """Images in flight at a time."""
    per_update: int
    """Bytes of the trained weights in the backbone's dtype, the buckets of all ranks together."""
    versions: int
    """Versions of the weights that are kept at a time."""
    per_prompt: int
    """Bytes of one encoded prompt, the longest."""
    prompts: int
    """Number of distinct prompts that the run draws, the empty one among them."""
    held: int
    """The most of these prompts that are in the object store at a time."""
    in_flight: int
    """Largest number of bytes in the object store."""
    between_learners: int = 0
    """Bytes that a learner sends to the others in a step, gradients and weights together."""


def traffic(config: RunConfig, costs: Costs, sizes: Sizes, prompts: int) -> Traffic:
    """The traffic of a run: staleness + 1 batches are in flight, with the versions they use and a window of prompts.

    prompts: number of prompts that are encoded. An evaluation holds one version more: the average of the weights.
    """
    model, method = config.backbone, config.surrogate()
    item, budget = model.torch_dtype.itemsize, method.max_terms(model.num_steps)
    latent = latent_bytes(costs, item)
    states = (budget.terms + budget.junction) * latent
    trained, times = len(config.rewards.differentiable), noised_times(config)
    terms = min(trained, 1) if config.rewards.balance == "none" else trained
    targets, cotangents = method.branches * latent, terms * method.branches * latent_bytes(costs, FP32)
    velocities = states if config.drift.on else 0
    forward = (1 + times) * latent if times else 0
    base = 0 if config.learners.base_penalty is None else states if trained else times * latent
    per_image = states + targets + cotangents + velocities + base + forward
    images = (config.staleness + 1) * config.data.shape.batch
    update = sizes.trained * item
    versions = config.staleness + 1 + (config.learners.ema is not None)
    per_prompt, held = prompt_bytes(costs), most_held(config, prompts)
    waiting = images * per_image + versions * update + held * per_prompt
    return Traffic(
        states,
        targets,
        cotangents,
        velocities,
        base,
        forward,
        per_image,
        images,
        update,
        versions,
        per_prompt,
        prompts,
        held,
        waiting,
        between_learners(config, sizes),
    )


def between_learners(config: RunConfig, sizes: Sizes) -> int:
    """Bytes that one learner sends to the others in a step (ZeRO, 1910.02054 §7).

    A reduction to shards or a gathering of them costs (n - 1) / n of what is reduced or gathered. Stage 0 reduces and
    gathers the gradients once; stage 1 reduces gradients once and gathers weights once; stage 2 reduces in each
    backward; stage 3 too, and gathers the weights for each forward and each backward, instead of once.
    """
    learners, item = config.learners, config.backbone.torch_dtype.itemsize
    calls = swept(config)[0] // learners.count
    trained, whole = sizes.trained * item, sizes.transformer * item
    reduced = trained * (calls if learners.zero >= 2 else 1)
    gathered = 2 * calls * whole if learners.zero == 3 else trained
    return (reduced + gathered) * (learners.count - 1) // learners.count
