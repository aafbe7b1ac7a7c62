"""How weights travel: published by return value, one object per version, read by those who lack that version.

Another transport (NCCL, NIXL) replaces this file: the same two functions.
"""

from __future__ import annotations

from typing import Any

import ray

from flowbp_ray.messages import Packed

Published = list[Any]
"""The object's reference inside a list: Ray then hands over the reference, and only `load` moves the bytes."""


def publish(learners: list[Any]) -> Published:
    """Ask every rank (gathering is collective) and keep the reference to rank 0's answer."""
    answers = [rank.publish.remote() for rank in learners]
    return answers[:1]


def load(published: Published) -> dict[str, Packed]:
    """The weights; shared memory on this node, one transfer per node otherwise."""
    reference: Any = published[0]
    return ray.get(reference)
