"""Reserve room on the cluster before anything starts there, and say so at once where there is none."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from flowbp_ray.failure import RunFailed
from flowbp_ray.settings import PoolConfig


def place(pool: PoolConfig, name: str, key: str, timeout: float) -> Any:
    """A placement group with one bundle per actor of `pool`, close together where possible; None if they need nothing.

    Raises RunFailed where it cannot be placed within `timeout` seconds, in which a cluster that can grow may do so.
    key: the pool's section of the configuration.
    """
    group = reserve(pool, pool.count)
    settle([group], pool, name, key, timeout)
    return group


def reserve(pool: PoolConfig, count: int) -> Any:
    """Ask for `count` bundles close together, without waiting for them; None if an actor of the pool needs nothing."""
    bundle = _bundle(pool)
    return placement_group([bundle] * count, strategy="PACK") if bundle else None


def settle(groups: Sequence[Any], pool: PoolConfig, name: str, key: str, timeout: float) -> None:
    """Wait until all of `pool`'s groups are placed. Raises RunFailed, and gives all back, where that is not in time."""
    until = time.monotonic() + timeout
    missing = [g for g in groups if g is not None and not g.wait(max(0.0, until - time.monotonic()))]
    if not missing:
        return
    for group in groups:
        free(group)
    bundle = _bundle(pool)
    there, left = _resources(ray.cluster_resources()), _resources(ray.available_resources())
    needs = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
    who = f"{pool.count} {name} with {needs} each" if pool.count > 1 else f"{name} with {needs}"
    some = f" ({len(missing)} of them found no room)" if len(groups) > len(missing) else ""
    fields = ["count"] * (pool.count > 1) + [f"{kind.lower()}s" for kind in bundle]
    raise RunFailed(
        f"{who} cannot be placed within {timeout:g} s{some}; the cluster has {there} ({left} free); write a smaller "
        f"{' or '.join(f'{key}.{field}' for field in fields)}, or a longer cluster.placement_timeout where the "
        "cluster grows on demand"
    )


def _bundle(pool: PoolConfig) -> dict[str, float]:
    return {kind: amount for kind, amount in (("CPU", pool.cpus), ("GPU", pool.gpus)) if amount}


def free(group: Any) -> None:
    if group is not None:
        remove_placement_group(group)


def _resources(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amounts.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
