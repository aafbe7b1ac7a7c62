"""Placement groups: reserve resources on the cluster before actors start, with a clear error if there are none."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.settings import PoolConfig

Group = PlacementGroup | None
"""Room that is reserved; None for actors that need no resources."""

POLL = 0.1  # seconds
_FIELDS = {"CPU": "cpus", "GPU": "gpus"}


def place(pool: PoolConfig, name: str, key: str, timeout: float) -> Group:
    """Create a placement group with one bundle per actor of `pool`, packed on few nodes; None if they need nothing.

    key: the pool's section of the configuration. Raises RunFailed if it is not placed within `timeout` seconds, in
    which an autoscaling cluster may grow.
    """
    group = reserve(pool, pool.count)
    wait_until_placed([group], pool, name, key, timeout)
    return group


def reserve(pool: PoolConfig, count: int) -> Group:
    """Request `count` bundles, packed on few nodes, without waiting; None if an actor of the pool needs nothing."""
    bundle = pool.bundle
    return placement_group([bundle] * count, strategy="PACK") if bundle else None


def pool_of_pairs(config: RunConfig) -> PoolConfig:
    """What Ray reserves for each learner with its sampler (`cluster.colocate: pairs`): all that both take of one GPU.

    One bundle for both keeps them together on any cluster; two bundles that fit on one GPU may be put on two.
    """
    learners, samplers = config.learners, config.samplers
    names = {**learners.resources, **samplers.resources}
    sums = {name: learners.resources.get(name, 0.0) + samplers.resources.get(name, 0.0) for name in names}
    both = {name: math.ceil(amount) if amount > 1 else amount for name, amount in sums.items()}
    cpus = learners.cpus + samplers.cpus
    return PoolConfig(count=learners.count, cpus=cpus, gpus=round(learners.gpus + samplers.gpus, 4), resources=both)


def wait_until_placed(groups: Sequence[Group], pool: PoolConfig, name: str, key: str, timeout: float) -> None:
    """Wait until all groups of `pool` are placed. After `timeout` seconds, free them all and raise RunFailed."""
    until = time.monotonic() + timeout
    while (missing := [group for group in groups if not is_placed(group)]) and time.monotonic() < until:
        time.sleep(POLL)
    if not missing:
        return
    for group in groups:
        free(group)
    bundle = pool.bundle
    kinds = ["CPU", "GPU", *pool.resources]
    there, left = (_said(amounts, kinds) for amounts in (ray.cluster_resources(), ray.available_resources()))
    needs = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
    who = f"{pool.count} {name} with {needs} each" if pool.count > 1 else f"{name} with {needs}"
    some = f" ({len(missing)} of them found no room)" if len(groups) > len(missing) else ""
    fields = dict.fromkeys(["count"] * (pool.count > 1) + [_FIELDS.get(kind, "resources") for kind in bundle])
    raise RunFailed(
        f"{who} cannot be placed within {timeout:g} s{some}; the cluster has {there} ({left} free); write a smaller "
        f"{' or '.join(f'{key}.{field}' for field in fields)}, or a longer cluster.placement_timeout where the "
        "cluster grows on demand"
    )


def is_placed(group: Group) -> bool:
    """Whether the group is placed now (None always is)."""
    # Not `group.wait`: it takes whole seconds only, and may return False for a group that is placed.
    return group is None or placement_group_table(group)["state"] == "CREATED"


def free(group: Group) -> None:
    if group is not None:
        remove_placement_group(group)


def _said(amounts: dict[str, float], kinds: Sequence[str]) -> str:
    return ", ".join(f"{amounts.get(kind, 0):g} {kind}" for kind in kinds)
