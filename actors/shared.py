"""The process of a sampler and a learner that share one frozen base and take turns."""

from __future__ import annotations

from typing import Any

import ray

from actors.learner import LearnerActor, learner_threads
from actors.process import hiding_errors, prepare
from actors.sampler import SamplerActor
from flowbp_ray.backbones.frozen import shared_base
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.rollout.sampler import build_sampler
from flowbp_ray.utils.settings import ElasticPoolConfig


@hiding_errors
class SharedActor(LearnerActor, SamplerActor):
    """Rolls out items and trains adapters over the same base tensors, as a pool's sampler and a group's only rank.

    Each role has adapters of its own: the learner's are trained, the sampler's are a published version, loaded as in a
    process of its own. Ray gives an actor one call at a time, so the roles take turns, at any staleness.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, learners = config, config.learners
        prepare(config, learner_threads(learners))
        if learners.engine == "deepspeed":  # the only rank; joined here because it must come before the base
            from flowbp_ray.learning.deepspeed import join_process_group

            join_process_group(0, learners, *self.rendezvous(), config.cluster.stall_timeout)
        self.base = shared_base(config)
        self.sampler = build_sampler(config, base=self.base)


RemoteShared: Any = ray.remote(SharedActor)


def pool_of_both(config: RunConfig) -> ElasticPoolConfig:
    """What Ray reserves for the process of both roles."""
    samplers, learners = config.samplers, config.learners
    return samplers.model_copy(
        update={
            "threads": learners.threads,
            "cpus": samplers.cpus + learners.cpus,
            "gpus": samplers.gpus + learners.gpus,
            "resources": {**samplers.resources, **learners.resources},
        }
    )
