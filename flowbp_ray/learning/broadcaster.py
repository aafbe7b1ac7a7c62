"""A learner rank's part in broadcasting weights: all ranks gather, rank 0 sends, and keeps copies of older versions."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowbp_ray.learning.engine import Engine
from flowbp_ray.messages import Version
from flowbp_ray.weights.broadcast import Delivery, Sender, limits
from flowbp_ray.weights.buckets import Blocks, Bucket
from flowbp_ray.weights.packing import PackedTensors, Place
from flowbp_ray.weights.staging import Mark, host_buffer


class Broadcaster:
    """Broadcasts an engine's weights. With `kept`, rank 0 has so many versions in host memory, for late samplers."""

    def __init__(self, engine: Engine, rank: int, device: str, kept: int, address: str, timeout: float) -> None:
        """address: of this host. timeout: seconds after which the run gives up a process that does not answer."""
        self.engine, self.device, self.most = engine, torch.device(device), kept
        self.blocks = Blocks.of(engine.sizes())
        self.sender = Sender(address, self.blocks, device, *limits(self.blocks, timeout)) if rank == 0 else None
        self.kept: dict[Version, list[Tensor]] = {}  # array by array, the oldest first
        self.places: list[Mapping[str, Place]] = []

    @property
    def port(self) -> int:
        """The port of the store; 0 on other ranks than 0."""
        return self.sender.port if self.sender else 0

    @torch.no_grad()
    def broadcast(self, version: Version, seats: Sequence[str]) -> Delivery:
        """Send the current weights to these samplers as `version`. All ranks must call it; rank 0's answer counts."""
        started, sender = time.perf_counter(), self.sender
        if sender is not None:
            sender.call(seats, (version.incarnation, version.step, version.ema))
        keeping = self._room(version) if sender is not None and self.most else None
        for number, (bucket, tensors) in enumerate(
            zip(self.blocks.buckets, self.engine.parts(self.blocks.buckets), strict=True)
        ):
            if sender is None:
                continue
            array = sender.array(bucket, tensors)
            sender.send(array)
            if keeping is not None:
                self._keep(keeping, number, bucket, tensors, array)
        if sender is None:
            return Delivery(())
        delivery = sender.finish()
        return replace(delivery, seconds=time.perf_counter() - started)

    def read(self, version: Version) -> Iterator[PackedTensors]:
        """Yield the buckets of a version that is kept. Raises KeyError if it is not."""
        for array, places in zip(self.kept[version], self.places, strict=True):
            yield PackedTensors((array.numpy(),), places)

    def _room(self, version: Version) -> list[Tensor]:
        """The arrays for a copy of `version`: those of the oldest one, if there are as many as may be."""
        held = self.kept.pop(version, None)
        if held is None and len(self.kept) >= self.most:
            held = self.kept.pop(next(iter(self.kept)))
        if held is None:
            held = [host_buffer(self.blocks.size(bucket), self.device) for bucket in self.blocks.buckets]
        self.kept[version] = held
        return held

    def _keep(
        self, held: Sequence[Tensor], number: int, bucket: Bucket, tensors: Mapping[str, Tensor], array: Tensor
    ) -> None:
        held[number].copy_(array, non_blocking=True)
        Mark(self.device).wait()
        if len(self.places) == number:
            starts, _ = self.blocks.offsets(bucket)
            self.places.append(
                {
                    name: (0, start, str(tensors[name].dtype).removeprefix("torch."), tuple(tensors[name].shape))
                    for name, start in starts.items()
                }
            )
