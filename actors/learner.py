"""One rank of the learner gang."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import ray

from flowbp_ray.config import RunConfig
from flowbp_ray.messages import Packed, Rollout, StepReport, unpack_all


class LearnerActor:
    """Built in two steps: rank 0 must name the rendezvous before any rank can join it."""

    def rendezvous(self) -> tuple[str, int]:
        """This host's address and a free port on it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def build(self, config: RunConfig, embeddings: dict[str, Packed], rank: int, address: str, port: int) -> bool:
        from actors.process import limit_threads
        from flowbp_ray.backbones import Embeddings
        from flowbp_ray.engine import init_gang
        from flowbp_ray.learner import Learner

        limit_threads(config.learners.threads)
        if config.learners.engine == "deepspeed":
            init_gang(rank, config.learners.count, address, port)
        self.learner = Learner(config, Embeddings(unpack_all(embeddings)), rank)
        return True

    def step(self, step: int, factor: float, *messages: Rollout | Packed) -> StepReport:
        """messages: this rank's rollouts, then as many cotangents; given one by one so that Ray fetches them here."""
        half = len(messages) // 2
        return self.learner.step(step, messages[:half], messages[half:], factor)  # type: ignore[arg-type]

    def publish(self) -> dict[str, Packed] | None:
        return self.learner.publish()

    def digest(self) -> str:
        return self.learner.digest()

    def save(self, folder: str) -> None:
        self.learner.save(folder)

    def load(self, folder: str) -> None:
        self.learner.load(folder)

    def modules(self) -> list[str]:
        """Names of the imported modules: a test reads that neither decoder nor reward is among them."""
        return sorted(sys.modules)

    def pid(self) -> int:
        return os.getpid()


RemoteLearner: Any = ray.remote(LearnerActor)
