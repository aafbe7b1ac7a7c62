"""The transport of weights: learners return them as objects, one per bucket, and samplers read the version they need.

All ranks return their own buckets (`flowbp_ray.weights.buckets`) at the same time. An object crosses the network once
per node, and all samplers on a node read the same memory. Another transport (NCCL, NIXL) would replace `publish` and
`load`, with its own kind of references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray
from torch import Tensor

from actors.errors import Ref
from flowbp_ray.messages import Version, combine
from flowbp_ray.weights.buckets import assign_buckets
from flowbp_ray.weights.fingerprint import fingerprint
from flowbp_ray.weights.packing import PackedTensors, merge_tensors

Refs = list[Ref]
"""A list of object references. Ray passes references inside a list as they are; only `load` moves bytes."""


@dataclass
class Published:
    """The published weights of a version.

    checks: references to each rank's checksums of its masters. acks: references that are ready once all buckets are
    stored. known: the fingerprint, if the driver published the weights itself.
    """

    version: Version
    weights: Refs
    checks: Sequence[Ref] = field(default=())
    acks: Sequence[Ref] = field(default=())
    known: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint that a sampler with this version must report."""
        return self.known or combine(ray.get(list(self.checks)))


def publish(learners: Sequence[Any], buckets: Sequence[int], version: Version) -> Published:
    """Call `publish` and `checksums` of all ranks and return the references. buckets: the number of each rank."""
    answers = [
        rank.publish.options(num_returns=count + 1).remote(version.ema)
        for rank, count in zip(learners, buckets, strict=True)
    ]
    checks = [rank.checksums.remote(version.ema) for rank in learners]
    weights = [bucket for answer in answers for bucket in answer[:-1]]
    return Published(version, weights, checks, [answer[-1] for answer in answers])


def restore(version: Version, tensors: Mapping[str, Tensor]) -> Published:
    """Publish a checkpoint's weights from the driver."""
    buckets = assign_buckets({name: tensor.nbytes for name, tensor in tensors.items()})
    weights = [ray.put(PackedTensors.of({name: tensors[name] for name in bucket.names})) for bucket in buckets]
    return Published(version, weights, known=fingerprint(tensors))


def load(weights: Refs) -> list[PackedTensors]:
    """Read published weights: from this node's shared memory, or with one transfer per node."""
    packed: list[PackedTensors] = ray.get(weights)
    return packed


def tensors(weights: Refs) -> dict[str, Tensor]:
    """Read published weights as tensors by name."""
    return merge_tensors(load(weights))
