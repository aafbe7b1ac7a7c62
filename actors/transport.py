"""The transport of weights: learners return them as objects, one per bucket, and samplers read the version they need.

All ranks return their own buckets (`flowbp_ray.weights.buckets`) at the same time. An object crosses the network once
per node, and all samplers on a node read the same memory.

With `cluster.transport: nccl` rank 0 broadcasts a version to the samplers (`actors.broadcasts`), which have it before
an item names it, so that items carry no references. The learners store a broadcast version only if somebody asks: a
sampler that did not receive it, or a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import ray
from ray.exceptions import RayError
from torch import Tensor

from actors.broadcasts import Broadcasts
from actors.errors import LearnersLost, Ref, WeightsMissing, cause
from flowbp_ray.messages import Version
from flowbp_ray.utils.checksums import combine
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.weights.buckets import assign_buckets
from flowbp_ray.weights.fingerprint import fingerprint
from flowbp_ray.weights.packing import PackedTensors, merge_tensors

Refs = list[Ref]
"""A list of object references. Ray passes references inside a list as they are; only `load` moves bytes."""


@dataclass
class Published:
    """The published weights of a version.

    stored: references to the buckets, empty as long as the version was only broadcast. checks: references to each
    rank's checksums of its masters. acks: references that are ready once all buckets are stored or broadcast. known:
    the fingerprint, once it is known without reading `checks`. on_demand: stores a version that was broadcast; returns
    `stored`, and references that are ready afterwards. holders: the samplers that received it by broadcast.
    """

    version: Version
    stored: Refs
    checks: Sequence[Ref] = field(default=())
    acks: Sequence[Ref] = field(default=())
    known: str = ""
    on_demand: Callable[[], tuple[Refs, Refs]] | None = None
    holders: set[int] = field(default_factory=set)

    @property
    def weights(self) -> Refs:
        """References to the buckets. The first request has the learners store a version that was broadcast."""
        if not self.stored and self.on_demand is not None:
            self.stored, self.acks = self.on_demand()
        return self.stored

    @cached_property
    def listed(self) -> Ref:
        """A reference to the list `weights`. There is a bucket for each learner rank, and calls carry one reference."""
        return ray.put(self.weights)

    def given_to(self, sampler: int) -> Refs:
        """`listed`, which an item carries to this sampler, or nothing if it has received the version by broadcast."""
        return [] if sampler in self.holders else [self.listed]

    def settle(self, holders: AbstractSet[int]) -> None:
        """Note who received the version; if nobody did, have it stored at once."""
        self.holders = set(holders)
        if not self.holders:
            _ = self.weights

    def check(self) -> None:
        """Raises LearnersLost if the learners could not store the version on demand."""
        if self.on_demand is None or not self.stored:
            return
        for ack in ray.wait(list(self.acks), num_returns=len(self.acks), timeout=0)[0]:
            try:
                ray.get(ack)
            except RayError as error:
                raise LearnersLost(
                    f"the learners failed storing version {self.version.step}: {cause(error)}"
                ) from error

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint that a sampler with this version must report."""
        return self.known or combine(ray.get(list(self.checks)))

    def confirm(self, held: str, sampler: int) -> None:
        """Raises RunFailed unless the weights that a sampler held have the fingerprint of the learners' masters."""
        if held != self.fingerprint:
            raise RunFailed(
                f"sampler {sampler} held weights {held} as version {self.version.step}"
                f"{' of the average' * self.version.ema}, but the learners' masters are {self.fingerprint}: what was "
                "published is not what was trained"
            )


def publish(
    learners: Sequence[Any], buckets: Sequence[int], version: Version, broadcasts: Broadcasts | None = None
) -> Published:
    """Call `publish` (or `broadcast`) and `checksums` of all ranks and return the references.

    buckets: the number of each rank. broadcasts: sends versions, but averages, which only evaluations need.
    """
    if broadcasts is None or version.ema:
        weights, acks = store(learners, buckets, version)
        return Published(version, weights, [rank.checksums.remote(version.ema) for rank in learners], acks)
    acks = broadcasts.send(learners, version)
    checks = [rank.checksums.remote() for rank in learners]
    if broadcasts.staleness:  # the learners may be further by then
        on_demand = partial(broadcasts.store_kept, learners[0], version)
    else:
        on_demand = partial(store, learners, buckets, version)
    return Published(version, [], checks, acks, on_demand=on_demand)


def store(learners: Sequence[Any], buckets: Sequence[int], version: Version) -> tuple[Refs, Refs]:
    """Have all ranks store their current weights; return references to the buckets, and to the ranks' answers."""
    answers = [
        rank.publish.options(num_returns=count + 1).remote(version.ema)
        for rank, count in zip(learners, buckets, strict=True)
    ]
    return [bucket for answer in answers for bucket in answer[:-1]], [answer[-1] for answer in answers]


def restore(version: Version, tensors: Mapping[str, Tensor]) -> Published:
    """Publish a checkpoint's weights from the driver."""
    buckets = assign_buckets({name: tensor.nbytes for name, tensor in tensors.items()})
    weights = [ray.put(PackedTensors.of({name: tensors[name] for name in bucket.names})) for bucket in buckets]
    return Published(version, weights, known=fingerprint(tensors))


def load_listed(listed: Refs) -> list[PackedTensors]:
    """`load` what an item carries (see `Published.given_to`). Raises WeightsMissing if that is nothing."""
    if not listed:
        raise WeightsMissing("the version was broadcast, but this sampler does not hold it")
    weights: Refs = ray.get(listed[0])
    return load(weights)


def load(weights: Refs) -> list[PackedTensors]:
    """Read published weights: from this node's shared memory, or with one transfer per node."""
    packed: list[PackedTensors] = ray.get(weights)
    return packed


def tensors(weights: Refs) -> dict[str, Tensor]:
    """Read published weights as tensors by name, in the driver. Raises LearnersLost if they could not be stored."""
    try:
        return merge_tensors(load(weights))
    except RayError as error:
        raise LearnersLost(f"the learners' weights cannot be read: {cause(error)}") from error
