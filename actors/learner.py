"""The process of one learner rank."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.process import hiding_errors, prepare, turn
from flowbp_ray.backbones.embeddings import PackedEmbeddings
from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Optimality, Packed, Rollout, StepReport, Version
from flowbp_ray.utils.addresses import free_port
from flowbp_ray.utils.checksums import TensorChecksum
from flowbp_ray.utils.tracing import span
from flowbp_ray.weights.packing import PackedTensors

if TYPE_CHECKING:
    from flowbp_ray.weights.broadcast import Delivery


@hiding_errors
class LearnerActor:
    """One learner rank. It is built in two steps: rank 0 names the rendezvous, then all ranks join it in `build`."""

    base: Any = None
    """The loaded base, where it is shared with a sampler of the same process."""

    def rendezvous(self) -> tuple[str, int]:
        """Return this host's address and a free port."""
        return ray.util.get_node_ip_address(), free_port("")

    def build(self, config: RunConfig, rank: int, address: str, port: int) -> str:
        """Join the process group, build the learner, and return this host's name."""
        from flowbp_ray.learning.learner import build_learner
        from flowbp_ray.learning.saver import StateSaver

        self.config = config
        prepare(config, learner_threads(config.learners))
        if config.learners.engine == "deepspeed" and self.base is None:
            from flowbp_ray.learning.deepspeed import join_process_group

            join_process_group(rank, config.learners, address, port, config.cluster.stall_timeout)
        with self._turn():
            self.learner = build_learner(config, rank=rank, base=self.base)
        self.saver = StateSaver(self.learner.engine, config.learners.count)
        return socket.gethostname()

    def step(
        self,
        step: int,
        factors: Sequence[float],
        shares: Sequence[float],
        optimality: Optimality | None,
        *messages: Rollout | Packed | PackedEmbeddings,
    ) -> StepReport:
        """Run one optimizer step. messages: this rank's rollouts, as many cotangents, and its prompts' embeddings.

        They are separate arguments because Ray only fetches references that are top-level arguments.
        """
        rollouts = self._received(messages)
        cotangents = [message for message in messages if isinstance(message, Packed)]
        with self._turn():
            return self.learner.step(step, rollouts, cotangents, factors, shares, optimality)

    def drift(self, *messages: Rollout | PackedEmbeddings) -> tuple[float, ...]:
        rollouts = self._received(messages)
        with self._turn():
            return self.learner.drift(rollouts)

    def _received(self, messages: Sequence[Rollout | Packed | PackedEmbeddings]) -> list[Rollout]:
        """Give the learner the embeddings among the messages; return the rollouts among them."""
        self.learner.embeddings = PackedEmbeddings.unpack(m for m in messages if isinstance(m, PackedEmbeddings))
        return [message for message in messages if isinstance(message, Rollout)]

    def buckets(self) -> int:
        """The number of buckets of weights that this rank publishes, at least one."""
        return sum(bucket.rank == self.learner.rank for bucket in self.learner.buckets)

    def publish(self, ema: bool = False) -> Iterator[PackedTensors | float]:
        """Yield one result per bucket, then the seconds. Ray stores each bucket before the next one is made.

        The driver reads the last result only.
        """
        started = time.perf_counter()
        with span("publish"), self._turn():
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
        with self._turn():
            return self.learner.checksums(ema)

    def digest(self) -> str:
        with self._turn():
            return self.learner.digest()

    def check_folder_visible(self, folder: str) -> None:
        """Raises ValueError if this node does not see the folder."""
        if not os.path.isdir(folder):
            raise ValueError(f"{socket.gethostname()} has no {folder}; write output=/a/folder that every node sees")

    def save(self, folder: str, background: bool) -> None:
        """Begin to write this rank's part of a checkpoint; see `StateSaver`."""
        with span("save"), self._turn():
            self.saver.begin(Path(folder), background)

    def saved(self, wait: bool) -> dict[str, str] | None:
        """The sha256 of the files by name; None while they are being written, unless that is waited for."""
        return self.saver.saved(wait)

    def load(self, folder: str) -> None:
        with self._turn():
            self.learner.load(folder)

    def modules(self) -> list[str]:
        """The names of the imported modules; a test checks that neither decoder nor reward is among them."""
        return sorted(sys.modules)

    def _turn(self) -> AbstractContextManager[None]:
        return turn(self.config, self.config.learners)

    def pid(self) -> int:
        return os.getpid()


def learner_threads(learners: LearnersConfig) -> int:
    """The CPU threads of a rank: `learners.threads`, or if that is null the rank's part of its node's cores.

    As many ranks are on the node as its GPUs have room for, and at most all.
    """
    if learners.threads is not None:
        return learners.threads
    if not learners.host_bound:
        return 1
    here = ray.get_runtime_context().get_node_id()
    gpus = next(node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["NodeID"] == here)
    return even_part(len(os.sched_getaffinity(0)), gpus, learners)


def even_part(cores: int, gpus: float, learners: LearnersConfig) -> int:
    """The cores of each rank on a node with `cores` and `gpus`, at least one. No two ranks share a GPU."""
    return max(1, cores // max(1, min(learners.count, int(gpus / max(1.0, learners.gpus)))))


RemoteLearner: Any = ray.remote(LearnerActor)
