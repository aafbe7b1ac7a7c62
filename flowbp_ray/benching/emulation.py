"""What an emulated actor is given instead of a configuration: seconds to wait, sizes to send. No torch, no pydantic."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Emulation:
    """Seconds are as they are waited, after `time_scale`; bytes as they are sent: those of weights after `bytes_scale`.

    sampler_s, reward_s, learner_s: per image. publish_s, load_s: per version. node_s: of a pass over the active nodes
    without gradient, per image. latent: shape of one; itemsize: of states and targets (cotangents are fp32). copies:
    cotangents per branch (one per reward where they are balanced).
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
    embedding_bytes: int
    rewards: tuple[str, ...]
    drift: bool
    base: bool


class Wait:
    """Started where a piece of work would start; `until(seconds)` sleeps for what is left of it."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def until(self, seconds: float) -> float:
        """Seconds since the start, once `seconds` have passed."""
        left = seconds - (time.perf_counter() - self.began)
        if left > 0:
            time.sleep(left)
        return time.perf_counter() - self.began
