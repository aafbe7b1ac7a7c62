"""How weights travel: published by return value, one object per version, read by those who lack that version.

Another transport (NCCL, NIXL) replaces this file: the same two functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray
from torch import Tensor

from flowbp_ray.fingerprint import combine, fingerprint
from flowbp_ray.messages import Version, pack_all

Reference = list[Any]
"""The object's reference inside a list: Ray then hands over the reference, and only `load` moves the bytes."""


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


def publish(learners: Sequence[Any], version: Version) -> Published:
    """Ask every rank (gathering is collective); keep the reference to rank 0's answer. `acks` say that it is there."""
    answers = [rank.publish.options(num_returns=2).remote(version.ema) for rank in learners]
    checks = [rank.checksums.remote(version.ema) for rank in learners]
    return Published(version, [answers[0][1]], checks, [ack for ack, _ in answers])


def restore(version: Version, tensors: Mapping[str, Tensor]) -> Published:
    """Weights that a checkpoint held, published by the driver."""
    return Published(version, [ray.put(pack_all(tensors))], known=fingerprint(tensors))


def load(held: Reference) -> Any:
    """Packed weights, or embeddings: shared memory on this node, one transfer per node otherwise."""
    reference: Any = held[0]
    return ray.get(reference)
