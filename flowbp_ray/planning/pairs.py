"""GPUs on which a sampler and a learner take turns, compared with GPUs that are divided between the two roles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowbp_ray.config.one_card import beside_pairs
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.work import Work


@dataclass(frozen=True)
class Pairs:
    """The predicted step of `cluster.colocate: pairs` beside that of separate samplers and learners at staleness 0."""

    gpus: int
    """GPUs of samplers and learners together."""
    pairs: int
    """How many of them have a sampler and a learner: the most by which a batch can be divided."""
    split: tuple[int, int]
    """Samplers and learners, a GPU each, with which a step is fastest without pairs."""
    time: float
    """Time of a step in pairs, relative to that of the split."""

    @property
    def line(self) -> str:
        """For people."""
        samplers, learners = (f"{n} {role}{'s' * (n > 1)}" for n, role in zip(self.split, ROLES, strict=True))
        return (
            f"cluster.colocate=pairs, a sampler and a learner in turns on each of {self.pairs} GPUs: a step takes "
            f"{self.time:.2f} times as long as with {samplers} and {learners}, the fastest split of {self.gpus} GPUs "
            "(the work above; the way of the weights and the rewards' own models are not counted)"
        )


ROLES = ("sampler", "learner")


def compare(config: RunConfig, work: Sequence[Work]) -> Pairs | None:
    """Pairs and the fastest split of the same GPUs; None where roles overlap, share GPUs otherwise, or have too few.

    work: of samplers, learners and reward servers. A step is sampling, beside which scoring goes on, and then learning.
    An item is on one sampler and one reward server; the learners divide all items evenly. Reward servers count where
    they have GPUs; on those of pairs, scoring delays the sampler that is there by all that it takes.
    """
    samplers, learners = config.samplers, config.learners
    if config.cluster.colocate == "pairs":
        gpus = learners.count
    elif config.cluster.colocate or min(samplers.gpus, learners.gpus) < 1:
        return None
    else:
        gpus = samplers.count + learners.count
    if config.staleness or gpus < 2:
        return None
    sampling, learning, scoring = (role.time for role in work)
    items, batch = config.data.shape.items, config.data.shape.batch

    def step(samplers: int, learners: int, shared: bool = False) -> float:
        drawn = sampling * math.ceil(items / samplers) / items
        scored = scoring * math.ceil(items / config.rewards.count) / items if config.rewards.gpus else 0.0
        return (drawn + scored if shared else max(drawn, scored)) + learning / learners

    ranks = [n for n in range(1, gpus + 1) if items % n == 0 and batch // n % learners.micro_batch == 0]
    if learners.engine == "torch":
        ranks = [1]
    best = min(((gpus - n, n) for n in ranks if n < gpus), key=lambda counts: step(*counts))
    shared = config.cluster.colocate == "pairs" and beside_pairs(config.rewards.gpus) > 0
    return Pairs(gpus, ranks[-1], best, step(ranks[-1], ranks[-1], shared) / step(*best))
