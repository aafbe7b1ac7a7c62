"""What travels and what waits in the object store: the bytes of docs/architecture.md, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.memory import FP32, Sizes, latent_bytes, prompt_bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes. Those of an image are at most, over the method's draws; `in_flight` is the store's largest content.

    per_prompt: one encoded prompt; prompts: how many there are, None where the file is not here. per_update: trained
    weights in the backbone's dtype, all ranks' buckets together. versions: of the weights that are kept at a time.
    """

    states: int
    targets: int
    cotangents: int
    velocities: int
    base: int
    per_image: int
    images: int
    per_update: int
    versions: int
    per_prompt: int
    prompts: int | None
    in_flight: int


def traffic(config: RunConfig, costs: Costs, sizes: Sizes, prompts: int | None) -> Traffic:
    """States, targets and cotangents of staleness + 1 batches, the versions they name, and the embeddings.

    While an evaluation runs, the average is one version more.
    """
    model, method = config.backbone, config.surrogate()
    item, budget = model.torch_dtype.itemsize, method.max_terms(model.num_steps)
    latent = latent_bytes(costs, item)
    states = (budget.terms + budget.junction) * latent
    terms = len(config.rewards.terms) if config.rewards.balance != "none" else 1
    targets, cotangents = method.branches * latent, terms * method.branches * latent_bytes(costs, FP32)
    velocities = states if config.drift.on else 0
    base = 0 if config.learners.base_penalty is None else states
    per_image = states + targets + cotangents + velocities + base
    images = (config.staleness + 1) * config.data.shape.batch
    update = sizes.trained * item
    versions = config.staleness + 1 + (config.learners.ema is not None)
    per_prompt = prompt_bytes(costs)
    waiting = images * per_image + versions * update + (1 + (prompts or 0)) * per_prompt
    return Traffic(
        states, targets, cotangents, velocities, base, per_image, images, update, versions, per_prompt, prompts, waiting
    )
