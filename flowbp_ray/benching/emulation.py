"""What an emulated actor gets instead of a configuration: seconds to wait, sizes to send. No torch, no pydantic."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Emulation:
    """Seconds to wait and bytes to send of each role; `time_scale` and `bytes_scale` of the profile are applied.

    sampler_s, reward_s, learner_s: per image. publish_s, load_s: per version. node_s: of a pass over the active nodes
    without gradient, per image. latent: shape of one latent; itemsize: bytes of an element of states and targets
    (cotangents are fp32). copies: cotangents per branch, one per reward where they are balanced, 0 without any that is
    backpropagated. rewards: names of the terms that are. drift, base: whether the drift meter's velocities and the
    base's are sent. scored: names of the terms without gradient.
    """

    sampler_s: float
    reward_s: float
    learner_s: float
    node_s: float
    publish_s: float
    load_s: float
    latent: tuple[int, ...]
    itemsize: int
    copies: int
    weight_bytes: int
    prompt_bytes: int
    rewards: tuple[str, ...]
    drift: bool
    base: bool
    scored: tuple[str, ...] = ()


class Wait:
    """Stands for a piece of work: made where the work would start, `until` sleeps for what is left of it."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def until(self, seconds: float) -> float:
        """Sleep until `seconds` have passed since the start; return the seconds since the start."""
        left = seconds - (time.perf_counter() - self.began)
        if left > 0:
            time.sleep(left)
        return time.perf_counter() - self.began
