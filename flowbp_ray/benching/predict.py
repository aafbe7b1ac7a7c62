"""How long a step takes at a ratio, in closed form, and its parameters: from a profile or fitted on one point.

A step takes at least as long as each role's share of the work, and as the chain that one batch goes through, one stage
after the other; staleness S lets S + 1 batches overlap:

    T = max(items·s/m + load,  items·r/q,  L/n + fixed,  chain/(S + 1))
    chain = load + ceil(items/m)·s + ceil(last/q)·r + L/n + fixed

s, r: seconds of an item in a sampler and in a reward server; L: seconds of a step's learning on one rank; load: seconds
of loading a new version in a sampler; fixed: seconds of publishing and of the driver, which no count divides; m, q, n:
samplers, reward servers, learners; last: items of the samplers' last round. At S = 0 the chain is the largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flowbp_ray.benching.emulation import Emulation
from flowbp_ray.benching.points import Point, Ratio
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.work import ratio as balanced

ROLES = ("samplers", "learners", "rewards")


@dataclass(frozen=True)
class Seconds:
    """The parameters of the formula above: s, r, L, load and fixed, of a step of `items` items with `batch` images."""

    batch: int
    items: int
    sampler: float
    reward: float
    learner: float
    load: float = 0.0
    fixed: float = 0.0

    @classmethod
    def of(cls, emulation: Emulation, config: RunConfig) -> Seconds:
        """Those of an emulated run, from its profile. The driver's seconds are not in it."""
        shape, branches = config.data.shape, config.surrogate().branches
        return cls(
            batch=shape.batch,
            items=shape.items,
            sampler=emulation.sampler_s * shape.rollout_batch,
            reward=emulation.reward_s * shape.rollout_batch * branches,
            learner=emulation.learner_s * shape.batch,
            load=emulation.load_s,
            fixed=emulation.publish_s,
        )

    def bounds(self, ratio: Ratio) -> dict[str, float]:
        """The four terms of the maximum by name, in seconds: each role, and the chain of one batch."""
        m, n, q = ratio.samplers, ratio.learners, ratio.rewards
        rounds = math.ceil(self.items / m)
        last = self.items - (rounds - 1) * m
        learning = self.learner / n + self.fixed
        sampled = self.load + rounds * self.sampler + math.ceil(last / q) * self.reward
        scored = self.load + self.sampler + math.ceil(self.items / q) * self.reward  # where scoring is the slower one
        return {
            "samplers": self.items * self.sampler / m + self.load,
            "learners": learning,
            "rewards": self.items * self.reward / q,
            "chain": (max(sampled, scored) + learning) / (ratio.staleness + 1),
        }

    def step(self, ratio: Ratio) -> float:
        """Seconds of a step."""
        return max(self.bounds(ratio).values())

    def ideal(self, ratio: Ratio) -> float:
        """Seconds of a step if loading, publishing and the driver cost nothing and items could be divided at will.

        Scoring overlaps with sampling; learning overlaps with both, and at staleness 0 follows them.
        """
        m, n, q = ratio.samplers, ratio.learners, ratio.rewards
        drawn, learned = max(self.items * self.sampler / m, self.items * self.reward / q), self.learner / n
        return drawn + learned if ratio.staleness == 0 else max(drawn, learned)

    def bottleneck(self, ratio: Ratio) -> str:
        """The largest of `bounds`, by name; at staleness 0, where the chain always is, the largest of the roles."""
        bounds = self.bounds(ratio)
        if ratio.staleness == 0:
            del bounds["chain"]
        return max(bounds, key=lambda name: bounds[name])

    def recommended(self) -> tuple[int, ...]:
        """The smallest numbers of samplers, learners, reward servers that keep each other busy (see `work.ratio`)."""
        return balanced((self.items * self.sampler + self.load, self.learner, self.items * self.reward))


def fit(point: Point) -> Seconds:
    """Fit on one measured point. What its step took beyond the formula counts as the driver's, where it is visible."""
    found = Seconds(
        batch=point.batch,
        items=point.items,
        sampler=point.sampler_s,
        reward=point.reward_s,
        learner=point.learner_s * point.ratio.learners,
        load=point.load_s,
        fixed=point.learn_s - point.learner_s + point.publish_s,
    )
    if point.ratio.staleness == 0 or found.bottleneck(point.ratio) == "learners":
        found = replace(found, fixed=found.fixed + max(0.0, point.step_s - found.step(point.ratio)))
    return found


def from_work(times: Sequence[float], point: Point) -> Seconds:
    """Seconds from the work of a step that `plan` counts (samplers, learners, rewards), at the speed of `point`.

    One number is taken from the measurement: seconds per operation, the same for all roles.
    """
    samplers, learners, rewards = times
    shares = Seconds(point.batch, point.items, samplers / point.items, rewards / point.items, learners)
    speed = point.step_s / shares.step(point.ratio)
    return replace(shares, sampler=shares.sampler * speed, reward=shares.reward * speed, learner=shares.learner * speed)


def driver_share(points: Sequence[Point], ratio: Ratio, items: int, step_s: float) -> float:
    """Extrapolate the driver's CPU share to another ratio, from measured points.

    Its CPU seconds of a step are fitted as a + b·items + c·processes·step_s by least squares; below three points, the
    last point's CPU per item is taken.
    """
    import numpy as np

    rows = [(1.0, p.items, _processes(p.ratio) * p.step_s) for p in points]
    if len(points) < 3:
        return points[-1].driver_s / points[-1].items * items / step_s
    found, *_ = np.linalg.lstsq(np.array(rows), np.array([p.driver_s for p in points]), rcond=None)
    return float(found @ np.array((1.0, items, _processes(ratio) * step_s)) / step_s)


def _processes(ratio: Ratio) -> int:
    return ratio.samplers + ratio.learners + ratio.rewards


def relative_errors(points: Sequence[Point], seconds: Seconds) -> Mapping[Ratio, float]:
    """Predicted over measured seconds of a step, minus one, by ratio."""
    return {p.ratio: seconds.step(p.ratio) / p.step_s - 1 for p in points}
