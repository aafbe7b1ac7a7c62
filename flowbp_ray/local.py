"""Without Ray: the same step in one process, for tests and for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flowbp_ray import prompts
from flowbp_ray.backbones.embeddings import encode
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.selection import select
from flowbp_ray.learning.learner import Learner
from flowbp_ray.messages import Item, RolloutReport, Scored, StepReport, Version, unpack
from flowbp_ray.rewards.remote import handshake
from flowbp_ray.rewards.scores import open_scorer
from flowbp_ray.rollout.items import items_of_run
from flowbp_ray.rollout.sampler import Sampler, alone
from flowbp_ray.run.folder import Run
from flowbp_ray.weights import trainable
from flowbp_ray.weights.packing import Parcel


@dataclass(frozen=True)
class _Done:
    """What `select` reads of an item."""

    item: Item
    report: RolloutReport
    result: Scored


class LocalLoop:
    """sampler, scorer and learner of a config (staleness 0, one rank, plain torch) in one process."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.texts = [r.text for r in prompts.load(config.data.prompts)]
        embeddings = encode(config, self.texts)
        self.sampler = Sampler(config, embeddings)
        self.scorer = open_scorer(config, handshake.check(config))
        self.learner = Learner(config, embeddings)
        self.method = config.surrogate()

    def items(self, step: int) -> list[Item]:
        """The items of a step, at version `step`."""
        return items_of_run(self.config, self.method, self.learner.sigmas, len(self.texts), step, Version(0, step))

    def step(self, step: int) -> StepReport:
        """One optimizer step of the same maths as the loop on Ray."""
        config = self.config
        published = list(self.learner.publish())
        rollouts, cotangents, jobs = [], [], []
        for item in self.items(step):
            report, rollout, target = self.sampler.rollout(item, lambda: published)
            texts = [self.texts[i] for i in item.prompt_ids]
            scored, cotangent = self.scorer.score(item, texts, report, target)
            rollouts.append(rollout)
            cotangents.append(cotangent)
            jobs.append(_Done(item, report, scored))
        drift = self.learner.drift(rollouts) if config.drift.max is not None else ()
        chosen = select(config, jobs, drift)
        return self.learner.step(step, rollouts, cotangents, chosen.factors, chosen.shares)


def draw(
    run: Run, texts: Sequence[str], step: int | None, guidance: float | None, seed: int
) -> tuple[int, list[np.ndarray]]:
    """Pictures [H, W, 3] uint8 of prompts with a run's checkpoint; also says which step's."""
    config = alone(run.config)
    used, tensors = run.checkpoints.weights(step, average=True)
    sampler = Sampler(config, encode(config, texts))
    trainable.install(sampler.transformer, tensors)
    sampler.version = Version(0, used)
    item = Item(
        purpose="sample",
        step=0,
        index=0,
        prompt_ids=tuple(range(len(texts))),
        samples=tuple(range(len(texts))),
        plans=(),
        seed=seed,
        num_steps=config.backbone.num_steps,
        guidance=config.backbone.guidance if guidance is None else guidance,
        version=Version(0, used),
    )
    latents = sampler.finish(item, _no_fetch)
    with torch.no_grad():
        images = sampler.backbone.load_decoder()(unpack(latents))
    return used, list((images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy())


def _no_fetch() -> list[Parcel]:
    raise RuntimeError("the sampler already holds the checkpoint's weights")
