"""The process of a reward server."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray

from actors.process import hiding_errors, prepare, turn
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Evaluated, Item, Packed, RolloutReport, Scored
from flowbp_ray.rewards.scores import Scores, open_scorer
from flowbp_ray.utils.tracing import span


@hiding_errors
class RewardActor:
    """Scores latents. It holds the decoder and the rewards, or a remote server's address; never the transformer."""

    def __init__(self, config: RunConfig, agreed: Mapping[str, str] | None = None) -> None:
        """agreed: the result of `handshake.check`, for remote reward servers."""
        prepare(config, config.rewards.threads)
        self.config = config
        self.scorer: Scores = open_scorer(config, agreed or {})
        self.gated = config.shows_samples  # never with remote servers, see `flowbp_ray.config.schema`

    def ready(self) -> str:
        """Return this host's name. Raises `Unavailable` if a remote reward server does not answer."""
        self.scorer.reach()
        return socket.gethostname()

    def score(
        self, item: Item, prompts: list[str], report: RolloutReport, target: Packed
    ) -> tuple[Scored, Packed] | tuple[Scored, Packed, np.ndarray]:
        """Return the scores and the cotangent of an item; in a run with a gate also the targets' pictures."""
        with span("score"), turn(self.config, self.config.rewards):
            scored, cotangent = self.scorer.score(item, prompts, report, target)
            return (scored, cotangent, self.scorer.pictures(target)) if self.gated else (scored, cotangent)

    def evaluate(self, item: Item, prompts: list[str], latents: Packed) -> Evaluated:
        with span("score"), turn(self.config, self.config.rewards):
            evaluated: Evaluated = self.scorer.evaluate(item, prompts, latents)
            return evaluated

    def pid(self) -> int:
        return os.getpid()


RemoteReward: Any = ray.remote(RewardActor)
