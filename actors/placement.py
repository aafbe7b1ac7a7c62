"""Reserve room on the cluster before anything starts there, and say so at once where there is none."""

from __future__ import annotations

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
    bundle = {kind: amount for kind, amount in (("CPU", pool.cpus), ("GPU", pool.gpus)) if amount}
    if not bundle:
        return None
    group = placement_group([bundle] * pool.count, strategy="PACK")
    if not group.wait(timeout):
        remove_placement_group(group)
        there, free = _resources(ray.cluster_resources()), _resources(ray.available_resources())
        needs = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle.items())
        who = f"{pool.count} {name} with {needs} each" if pool.count > 1 else f"{name} with {needs}"
        fields = ["count"] * (pool.count > 1) + [f"{kind.lower()}s" for kind in bundle]
        raise RunFailed(
            f"{who} cannot be placed within {timeout:g} s; the cluster has {there} ({free} free); write a smaller "
            f"{' or '.join(f'{key}.{field}' for field in fields)}, or a longer cluster.placement_timeout where the "
            "cluster grows on demand"
        )
    return group


def free(group: Any) -> None:
    if group is not None:
        remove_placement_group(group)


def _resources(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amounts.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
