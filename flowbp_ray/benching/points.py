"""What was measured at one ratio: a point, from the lines that a run logs and the driver's clocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.scaling import idle


@dataclass(frozen=True, order=True)
class Ratio:
    """The number of processes of each role, and the staleness: how many versions the samplers may lag behind."""

    samplers: int
    learners: int
    rewards: int
    staleness: int

    def __str__(self) -> str:
        return f"{self.samplers}:{self.learners}:{self.rewards} S={self.staleness}"

    @classmethod
    def of(cls, config: RunConfig) -> Ratio:
        """The ratio of a configuration."""
        return cls(config.samplers.count, config.learners.count, config.rewards.count, config.staleness)


@dataclass(frozen=True)
class ClockReading:
    """The driver's clocks at the end of a step: wall, CPU of its process, CPU of the thread that runs the loop.

    looks, looked_at: how often it has looked for answers, and at how many calls in flight in all of these looks.
    """

    wall: float
    process: float
    thread: float
    looks: int = 0
    looked_at: int = 0


@dataclass(frozen=True)
class Point:
    """Means over `steps` steps at one ratio; times in seconds.

    batch, items: images and items of a step. devices: of all roles together, GPUs where roles ask for them, else
    processes. sampler_s, reward_s: of an item; load_s: of a sampler that loads a version, in a step; learner_s: of the
    slowest rank in a step; wait_s, learn_s, publish_s: of the driver's phases. driver_s, driver_thread_s: CPU of the
    driver's process and of its thread, in a step. looks, looked_at: of a step, see `ClockReading`. idle: by role, the
    share of the time in which it did not compute. weight_bytes: that samplers loaded in a step. retries: calls done
    again since the run began.
    """

    ratio: Ratio
    steps: int
    batch: int
    items: int
    devices: float
    step_s: float
    sampler_s: float
    reward_s: float
    learner_s: float
    load_s: float
    wait_s: float
    learn_s: float
    publish_s: float
    driver_s: float
    driver_thread_s: float
    looks: float
    looked_at: float
    idle: dict[str, float]
    bytes_per_image: float
    weight_bytes: float
    retries: int

    @property
    def loading(self) -> int:
        """Samplers that load a version in a step: no more of them get work than a batch has items."""
        return min(self.ratio.samplers, self.items)

    @property
    def images_per_s(self) -> float:
        """Training images per second."""
        return self.batch / self.step_s

    @property
    def per_device(self) -> float:
        """Images per second and device, over all devices."""
        return self.images_per_s / self.devices

    def to_dict(self) -> dict[str, Any]:
        """For bench.json."""
        plain = {**self.__dict__, "ratio": self.ratio.__dict__}
        return plain | {"images_per_s": self.images_per_s, "images_per_s_per_device": self.per_device}


def devices(config: RunConfig) -> float:
    """The GPUs that all roles ask for together; where none asks for any, the number of processes."""
    pools = (config.samplers, config.learners, config.rewards)
    return sum(pool.count * pool.gpus for pool in pools) or sum(pool.count for pool in pools)


def measured_point(config: RunConfig, lines: Sequence[Mapping[str, Any]], readings: Sequence[ClockReading]) -> Point:
    """The point of a run's steps. lines: of those steps, from metrics.jsonl. readings: before them and after each."""
    ratio, steps, items = Ratio.of(config), len(lines), config.data.shape.items
    assert steps == len(readings) - 1 > 0

    def mean(key: str) -> float:
        return float(np.mean([line[key] for line in lines]))

    def per_step(clock: str) -> float:
        return float((getattr(readings[-1], clock) - getattr(readings[0], clock)) / steps)

    step_s = per_step("wall")
    work = {key: mean(key) for key in ("sampler_s", "load_s", "reward_s", "learner_s", "publish_s")}
    return Point(
        ratio=ratio,
        steps=steps,
        batch=config.data.shape.batch,
        items=items,
        devices=devices(config),
        step_s=step_s,
        sampler_s=work["sampler_s"] / items,
        reward_s=work["reward_s"] / items,
        learner_s=work["learner_s"],
        load_s=work["load_s"] / min(ratio.samplers, items),
        wait_s=mean("wait_s"),
        learn_s=mean("learn_s"),
        publish_s=work["publish_s"],
        driver_s=per_step("process"),
        driver_thread_s=per_step("thread"),
        looks=per_step("looks"),
        looked_at=per_step("looked_at"),
        idle={name.removeprefix("idle/"): share for name, share in idle(work, ratio.__dict__, step_s).items()},
        bytes_per_image=mean("travel_bytes_per_image"),
        weight_bytes=mean("weight_bytes"),
        retries=int(lines[-1]["retries"]),
    )
