"""The process of one learner rank."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ray

from flowbp_ray.backbones.embeddings import PackedEmbeddings
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Packed, Rollout, StepReport, TensorChecksum, Version
from flowbp_ray.utils.addresses import free_port
from flowbp_ray.utils.tracing import span
from flowbp_ray.weights.packing import PackedTensors

if TYPE_CHECKING:
    from flowbp_ray.weights.broadcast import Delivery


class LearnerActor:
    """One learner rank. It is built in two steps: rank 0 names the rendezvous, then all ranks join it in `build`."""

    def rendezvous(self) -> tuple[str, int]:
        """Return this host's address and a free port."""
        return ray.util.get_node_ip_address(), free_port("")

    def build(self, config: RunConfig, embeddings: PackedEmbeddings, rank: int, address: str, port: int) -> str:
        """Join the process group, build the learner, and return this host's name."""
        from actors.process import prepare
        from flowbp_ray.learning.learner import build_learner

        prepare(config, config.learners.threads)
        if config.learners.engine == "deepspeed":
            from flowbp_ray.learning.deepspeed import join_process_group

            join_process_group(rank, config.learners, address, port, config.cluster.stall_timeout)
        self.learner = build_learner(config, embeddings.unpack(), rank)
        return socket.gethostname()

    def step(
        self, step: int, factors: Sequence[float], shares: Sequence[float], *messages: Rollout | Packed
    ) -> StepReport:
        """Run one optimizer step. messages: this rank's rollouts, then as many cotangents.

        They are separate arguments because Ray only fetches references that are top-level arguments.
        """
        half = len(messages) // 2
        return self.learner.step(step, messages[:half], messages[half:], factors, shares)  # type: ignore[arg-type]

    def drift(self, *rollouts: Rollout) -> tuple[float, ...]:
        return self.learner.drift(rollouts)

    def buckets(self) -> int:
        """The number of buckets of weights that this rank publishes, at least one."""
        return sum(bucket.rank == self.learner.rank for bucket in self.learner.buckets)

    def publish(self, ema: bool = False) -> Iterator[PackedTensors | float]:
        """Yield one result per bucket, then the seconds. Ray stores each bucket before the next one is made.

        The driver reads the last result only.
        """
        started = time.perf_counter()
        with span("publish"):
            yield from self.learner.publish(ema)
        yield time.perf_counter() - started

    def open_broadcasts(self, kept: int, timeout: float) -> tuple[str, int, int]:
        """Get ready for `broadcast`; return rank 0's address and port, and the number of buckets.

        kept: versions of which rank 0 keeps a copy. timeout: cluster.stall_timeout.
        """
        from flowbp_ray.learning.broadcaster import Broadcaster

        learner, address = self.learner, ray.util.get_node_ip_address()
        device = learner.config.device
        self.broadcaster = Broadcaster(learner.engine, learner.rank, device, kept, address, timeout)
        return address, self.broadcaster.port, len(self.broadcaster.blocks.buckets)

    def broadcast(self, version: Version, seats: Sequence[str]) -> Delivery:
        """Send the weights to the samplers in these seats."""
        with span("publish"):
            return self.broadcaster.broadcast(version, seats)

    def publish_kept(self, version: Version) -> Iterator[PackedTensors | float]:
        """Yield rank 0's copy of a version that was broadcast, as `publish` does."""
        started = time.perf_counter()
        yield from self.broadcaster.read(version)
        yield time.perf_counter() - started

    def checksums(self, ema: bool = False) -> dict[str, TensorChecksum]:
        return self.learner.checksums(ema)

    def digest(self) -> str:
        return self.learner.digest()

    def check_folder_visible(self, folder: str) -> None:
        """Raises ValueError if this node does not see the folder."""
        if not os.path.isdir(folder):
            raise ValueError(f"{socket.gethostname()} has no {folder}; write output=/a/folder that every node sees")

    def save(self, folder: str) -> None:
        with span("save"):
            self.learner.save(folder)

    def load(self, folder: str) -> None:
        self.learner.load(folder)

    def modules(self) -> list[str]:
        """The names of the imported modules; a test checks that neither decoder nor reward is among them."""
        return sorted(sys.modules)

    def pid(self) -> int:
        return os.getpid()


RemoteLearner: Any = ray.remote(LearnerActor)
