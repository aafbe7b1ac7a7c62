"""The process of a sampler."""

from __future__ import annotations

import os
import socket
from typing import Any

import ray
from ray.exceptions import RayError

from actors import transport
from actors.errors import EmbeddingsLost, Ref, cause
from actors.process import hiding_errors, prepare, turn
from flowbp_ray.backbones.embeddings import PackedEmbeddings
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Item, Packed, Rollout, RolloutReport
from flowbp_ray.rollout.held import Key
from flowbp_ray.rollout.sampler import build_sampler


@hiding_errors
class SamplerActor:
    """Rolls out items. It holds the transformer without optimizer state.

    Results are return values, not `ray.put`, so that the driver owns them and they outlive this process.
    """

    def __init__(self, config: RunConfig) -> None:
        prepare(config, config.samplers.threads)
        self.config = config
        self.sampler = build_sampler(config)

    def ready(self) -> str:
        """Return this host's name."""
        return socket.gethostname()

    def rollout(
        self, item: Item, weights: transport.Refs, embeddings: transport.Refs
    ) -> tuple[RolloutReport, Rollout, Packed]:
        self._hold(embeddings)
        with self.sampler.busy, turn(self.config, self.config.samplers):
            return self.sampler.rollout(item, lambda: transport.load_listed(weights))

    def sample(self, item: Item, weights: transport.Refs, embeddings: transport.Refs) -> tuple[str, Packed]:
        """Return the fingerprint of the weights that were used, and the finished latents."""
        self._hold(embeddings)
        with self.sampler.busy, turn(self.config, self.config.samplers):
            latents = self.sampler.sample(item, lambda: transport.load_listed(weights))
            return self.sampler.fingerprint, latents

    def sit(self, address: str, port: int, seat: str, spare: int, timeout: float) -> None:
        """From now on receive the versions that learner rank 0, whose store is there, broadcasts to this seat."""
        self.sampler.open_inbox(address, port, seat, spare, timeout)

    def _hold(self, embeddings: transport.Refs) -> None:
        """Read the parts that are not held. Every call passes those it needs: an elastic or restarted process has none.

        They are known by the bytes of their references: a reference that is kept would keep the object.
        """
        refs: dict[Key, Ref] = {ref.binary(): ref for ref in embeddings}
        self.sampler.hold(list(refs), lambda keys: _fetch([refs[key] for key in keys]))

    def fingerprint(self) -> str:
        """The fingerprint of the weights that this process holds; before the first item those of the model's files."""
        return self.sampler.current()

    def digest(self) -> str:
        return self.sampler.digest()

    def pid(self) -> int:
        return os.getpid()


def _fetch(parts: list[Ref]) -> list[PackedEmbeddings]:
    """`ray.get`. Raises EmbeddingsLost if one of the parts is gone."""
    try:
        found: list[PackedEmbeddings] = ray.get(parts)
    except RayError as error:
        raise EmbeddingsLost(cause(error)) from error
    return found


RemoteSampler: Any = ray.remote(SamplerActor)
