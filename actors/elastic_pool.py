"""A pool that can grow and shrink: each actor has its own placement group, so it starts and ends independently."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import ray

from actors.errors import cause
from actors.placement import Group, free, is_placed, reserve, wait_until_placed
from actors.pool import Pool
from actors.process import actor_options
from flowbp_ray.utils.settings import PoolConfig

RESTARTS = -1  # unlimited: the state of samplers and reward servers can always be rebuilt


class ElasticPool(Pool):
    """A `Pool` that creates and ends its actors and their placement groups."""

    def __init__(
        self,
        name: str,
        key: str,
        remote: Any,
        config: PoolConfig,
        timeout: float,
        make: Callable[[int], Sequence[Any]],
        place: Callable[[int], Hashable],
        within: Group = None,
    ) -> None:
        """key: the pool's section of the configuration. make(i): the constructor arguments of actor i.

        place(i): what actor i depends on, see `Pool`. within: somebody else's group, whose bundle i has room for actor
        i; the pool then reserves and frees nothing, and keeps its size. Raises RunFailed if the first `config.count`
        actors cannot be placed within `timeout` seconds.
        """
        self.remote, self.config, self.timeout = remote, config, timeout
        self.make, self.place = make, place
        self.within = within
        self.groups: dict[int, Group] = {i: within or reserve(config, 1) for i in range(config.count)}
        self.waiting: dict[int, float] = {}  # index of an actor that is not placed yet -> since when
        try:
            wait_until_placed(list(self.groups.values()), config, f"{name}s", key, timeout)
            handles = [self._start(i) for i in self.groups]
        except BaseException:
            self._free()
            raise
        super().__init__(name, handles, [place(i) for i in self.groups])

    def _start(self, index: int) -> Any:
        bundle = 0 if self.within is None else index
        options = actor_options(self.config, RESTARTS, self.groups[index], bundle)
        return self.remote.options(**options).remote(*self.make(index))

    def resize(self, size: int) -> None:
        """Start or retire actors until `size` are active. Returns at once: a new actor gets work once it is ready."""
        while len(self.active) < size:
            index = len(self.handles)
            self.groups[index] = reserve(self.config, 1)
            self.waiting[index] = time.monotonic()
            self.join(self._start(index), self.place(index))
        while len(self.active) > size:
            self.leave()
        self.dismiss()

    def dismiss(self) -> None:
        """End the leaving actors that have finished their calls, and free their placement groups."""
        for index in self.left():
            ray.kill(self.handles[index])
            free(self.groups.pop(index))
            self.waiting.pop(index, None)

    def complain(self, log: logging.Logger) -> None:
        """Log, once each, the new actors whose constructor failed (and retire them) or not placed in `timeout` s."""
        for index, error in self.failed.items():
            log.warning("%s %d could not be built: %s", self.name, index, cause(error))
            if index in self.active:
                self.leave(index)
        self.failed = {}
        self.dismiss()
        for index, since in list(self.waiting.items()):
            if is_placed(self.groups[index]):
                del self.waiting[index]
            elif time.monotonic() - since > self.timeout:
                del self.waiting[index]
                log.warning("%s %d still waits for room; the run goes on without it", self.name, index)

    def stop(self) -> None:
        """End all actors and free their placement groups."""
        for index, handle in enumerate(self.handles):
            if index not in self.retired:
                ray.kill(handle)
        self._free()

    def _free(self) -> None:
        for group in self.groups.values() if self.within is None else ():
            free(group)
        self.groups = {}
