"""The process that encodes prompts, or reads them from the cache: where it is placed, and when there is room for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.encoder import RemoteEncoder, RemoteReader
from actors.placement import Group, free, place
from actors.process import Roles, actor_options
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Encoded
from flowbp_ray.utils.files import cache_path
from flowbp_ray.utils.settings import PoolConfig, ProcessConfig


class EncoderProcess:
    """An encoder, or a reader: started when it is called, and ended when it has nothing to do."""

    def __init__(self, config: RunConfig, roles: Roles) -> None:
        self.config, self.roles = config, roles
        self.actor: Any = None
        self.group: Group = None
        self.reads = False

    def start(self, folder: Path | None = None, node: str = "") -> Any:
        """The actor that runs, or a new one: an encoder; with `folder`, a reader of that folder of the cache.

        node: where the folder is, by Ray's id; if that node is gone, the reader is elsewhere. A reader reserves
        nothing: it has a place even where the encoder's GPU has been given to others. Raises RunFailed if there is no
        room for an encoder.
        """
        if self.actor is not None:
            return self.actor
        self.reads, config, encoder = folder is not None, self.config, self.config.encoder
        if folder is not None:
            options = actor_options(ProcessConfig(cpus=0), restarts=0)
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
            self.actor = RemoteReader.options(**options).remote(config, folder)
            return self.actor
        cache = cache_path(encoder.cache)  # resolved here: the encoder's node may have another environment
        here = encoder.model_copy(update={"cache": cache and str(cache)})
        pool = PoolConfig(count=1, **{key: getattr(encoder, key) for key in ProcessConfig.model_fields})
        self.group = place(pool, "the encoder", "encoder", config.cluster.placement_timeout)
        options = actor_options(encoder, restarts=0, group=self.group)
        remote = (self.roles.encoder or RemoteEncoder).options(**options)
        self.actor = remote.remote(self.roles.settings(config.model_copy(update={"encoder": here})))
        return self.actor

    def end(self) -> None:
        """End it and free its place."""
        if self.actor is not None:
            ray.kill(self.actor)
            free(self.group)
        self.actor, self.group, self.reads = None, None, False


def together(earlier: Encoded | None, report: Encoded) -> Encoded:
    """The report of a process and that of an earlier one, on other texts, as one."""
    if earlier is None:
        return report
    found, encoded = earlier.found + report.found, earlier.encoded + report.encoded
    broken = (*earlier.broken, *report.broken)
    return Encoded(found, encoded, earlier.nbytes + report.nbytes, broken, report.folder)


def has_room_beside(config: RunConfig) -> bool:
    """Whether the cluster has GPUs for the encoder beside all others of the run. Ask before anything is placed.

    Not where a pool asks for nodes of its own, whose GPUs the encoder might take.
    """
    every = (config.encoder, config.learners, config.samplers, config.rewards)
    if config.encoder.gpus and any(pool.resources for pool in every):
        return False
    pools = [(1, config.encoder.gpus), (config.rewards.bounds[1], config.rewards.gpus)]
    if config.cluster.colocate == "pairs":
        pools.append((config.learners.count, 1))
    else:
        samplers, learners = config.samplers, config.learners
        pools += [(samplers.bounds[1], samplers.gpus), (learners.count, learners.gpus)]
    pools += [(1, judge.gpus) for judge in config.judges if judge.model is not None]
    needed = sum(math.ceil(count * gpus) for count, gpus in pools)
    return not config.encoder.gpus or needed <= ray.available_resources().get("GPU", 0)
