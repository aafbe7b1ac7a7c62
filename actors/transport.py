"""How weights travel: published by return value, a bucket an object, read by those who lack that version.

Every rank returns its own buckets (`flowbp_ray.weights.buckets`), all ranks at a time. Objects cross the network once
per node, for whoever there asks first; its other samplers read the same memory. Another transport (NCCL, NIXL) replaces
`publish` and `load`, and says by its own kind of Reference where the weights are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray
from torch import Tensor

from flowbp_ray.messages import Version, combine
from flowbp_ray.weights.buckets import assign_buckets
from flowbp_ray.weights.fingerprint import fingerprint
from flowbp_ray.weights.packing import PackedTensors, merge_tensors

Reference = list[Any]
"""References to objects inside a list: Ray then hands over the references, and only `load` and `read` move bytes."""


@dataclass
class Published:
    """The weights of a version, and what each learner rank says of its masters."""

    version: Version
    weights: Reference
    checks: Sequence[Any] = field(default=())
    acks: Sequence[Any] = field(default=())
    known: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """What a sampler that holds this version must report."""
        return self.known or combine(ray.get(list(self.checks)))


def publish(learners: Sequence[Any], buckets: Sequence[int], version: Version) -> Published:
    """Ask every rank at once for its buckets, so many of each; keep the references. `acks` say that all are there."""
    answers = [
        rank.publish.options(num_returns=count + 1).remote(version.ema)
        for rank, count in zip(learners, buckets, strict=True)
    ]
    checks = [rank.checksums.remote(version.ema) for rank in learners]
    weights = [bucket for answer in answers for bucket in answer[:-1]]
    return Published(version, weights, checks, [answer[-1] for answer in answers])


def restore(version: Version, tensors: Mapping[str, Tensor]) -> Published:
    """Weights that a checkpoint held, published by the driver."""
    buckets = assign_buckets({name: tensor.nbytes for name, tensor in tensors.items()})
    weights = [ray.put(PackedTensors.of({name: tensors[name] for name in bucket.names})) for bucket in buckets]
    return Published(version, weights, known=fingerprint(tensors))


def load(weights: Reference) -> list[PackedTensors]:
    """What was published: shared memory on this node, one transfer per node otherwise."""
    packed: list[PackedTensors] = ray.get(weights)
    return packed


def tensors(weights: Reference) -> dict[str, Tensor]:
    """What was published, by name: for who has no module to put it into."""
    return merge_tensors(load(weights))


def read(held: Reference) -> Any:
    """The one object that is referred to, such as the embeddings of all prompts."""
    [reference] = held
    return ray.get(reference)
