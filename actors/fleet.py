"""The actors of a run: placed, built and ended together."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.broadcasts import Broadcasts
from actors.elastic_pool import ElasticPool
from actors.encoding import Encoding
from actors.errors import Ref, cause
from actors.learner_group import LearnerGroup
from actors.pipeline import Pipeline
from actors.placement import Group
from actors.process import REAL, Roles
from actors.queue_stats import QueueStats
from actors.reward import RemoteReward
from actors.sampler import RemoteSampler
from actors.shared import RemoteShared, pool_of_both
from actors.transport import Published
from flowbp_ray.config.rewards import RewardsConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Version
from flowbp_ray.prompts import Needs
from flowbp_ray.rewards.remote.client import assigned
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.settings import PoolConfig


class Fleet:
    """The encoder (which ends with the last prompt), samplers, reward servers and learners. It is a context manager."""

    learners: LearnerGroup
    pipeline: Pipeline
    encoding: Encoding

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[str],
        agreed: Mapping[str, str] | None = None,
        roles: Roles = REAL,
        notify: Callable[[str], None] = lambda line: None,
        needs: Needs | None = None,
        learns: bool = True,
    ) -> None:
        """agreed: the result of `handshake.check`, for remote reward servers. notify: takes what is waited for.

        needs: which of `prompts` the steps draw; None: all are training prompts. No others are encoded unasked.
        learns: False for an evaluation, which has no learners.
        """
        self.config, self.agreed, self.roles, self.notify = config, agreed or {}, roles, notify
        self.learns = learns
        self._encoding: Encoding | None = None
        self.pools: dict[str, ElasticPool] = {}
        self.hosts: dict[str, list[str]] = {}  # role -> host on which each process started
        self._learners: LearnerGroup | None = None
        self._pipeline: Pipeline | None = None
        try:
            self._start(config, list(prompts), needs or Needs(config, len(prompts)))
        except BaseException:
            self.stop()
            raise

    def _start(self, config: RunConfig, prompts: list[str], needs: Needs) -> None:
        timeout = config.cluster.stall_timeout
        self.notify("placing the encoder")
        self.encoding = self._encoding = Encoding(config, prompts, needs, self.roles, self.notify)
        if not self.encoding.beside:  # the other actors need its GPU
            self.encoding.finish()
            self.encoding.end()
        shares = config.cluster.share_base and self.roles.sampler is None  # emulated processes have nothing to share
        if self.learns:
            self.notify(f"placing the learners ({config.learners.count})")
            self.learners = self._learners = LearnerGroup(
                config, self.roles, self.notify, self._wait, self.encoding.await_refs, shares
            )
        if shares:
            samplers = self._pool("sampler", "samplers", RemoteShared, pool_of_both(config))
            self.learners.host = samplers.handles[0]
        else:
            pairs = self.learns and config.cluster.colocate == "pairs"
            remote, group = self.roles.sampler or RemoteSampler, self.learners.group if pairs else None
            samplers = self._pool("sampler", "samplers", remote, config.samplers, within=group)
        reward = self.roles.reward or RemoteReward
        scorers = self._pool("reward server", "rewards", reward, config.rewards, self.agreed)
        for who, refs in (
            ("learners", self.learners.launch() if self.learns else []),
            ("samplers", [h.ready.remote() for h in samplers.handles]),
            ("reward servers", [h.ready.remote() for h in scorers.handles]),
        ):
            self.hosts[who] = []
            for ref in refs:
                self.notify(f"building the {who}: {len(self.hosts[who])} of {len(refs)}")
                if not self._wait([ref], timeout)[0]:
                    raise RunFailed(f"the {who} did not answer within {timeout:.0f} s")
                self.hosts[who].append(_get(ref, f"the {who}", timeout))
        if self.learns and config.broadcasts and self.roles.learner is None:
            self.learners.broadcasts = Broadcasts(samplers, config.staleness, timeout)
        tries, gated = config.cluster.tries, config.shows_samples
        self.queues = QueueStats(self.notify)
        pools = (samplers, scorers)
        self.pipeline = self._pipeline = Pipeline(
            *pools, self.encoding, prompts, tries, timeout, gated, self.queues.observe
        )

    def _wait(self, refs: Sequence[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
        """`ray.wait` while the encoder stays at work; once there is a pipeline, this works on its items too."""
        if self._pipeline is None:
            return self.encoding.wait_for(refs, timeout)
        return self._pipeline.wait_for(refs, timeout)

    def _pool(
        self, name: str, key: str, remote: Any, pool: PoolConfig, *more: Any, within: Group = None
    ) -> ElasticPool:
        """Start the actors of a pool. more: constructor arguments after the configuration. within: see ElasticPool."""
        urls = pool.url if isinstance(pool, RewardsConfig) else None
        self.notify(f"placing the {name}s ({pool.count})")
        self.pools[key] = ElasticPool(
            name,
            key,
            remote,
            pool,
            self.config.cluster.placement_timeout,
            make=lambda index: (self.roles.settings(assigned(self.config, index)), *more),
            place=lambda index: urls[index % len(urls)] if urls else index,
            within=within,
        )
        return self.pools[key]

    def log_start(self, log: logging.Logger) -> None:
        """Log the encoder's report and the hosts of all roles. It is also where broadcasts of weights are logged."""
        self.encoding.log_to(log)
        self.pipeline.note = log.warning
        if self.learns and self.learners.broadcasts is not None:
            self.learners.broadcasts.log = log
        elif self.learns and self.config.cluster.transport != "object_store":
            log.info(
                "weights travel by the object store: adapters are small, and emulated actors have none to broadcast"
            )
        log.info("%s", "; ".join(f"{who} on {counted(hosts)}" for who, hosts in self.hosts.items() if hosts))

    def built_with(self, version: Version) -> Published:
        """The weights that the samplers were built with, as `version`: no tensor travels."""
        held = self.pools["samplers"].handles[0].fingerprint.remote()
        return Published(version, [], known=_get(held, "the samplers", self.config.cluster.stall_timeout))

    def saved(self, step: int) -> None:
        """After the checkpoint of `step`, let go of the embeddings that no step from there on draws.

        Later steps may have begun while it was written; where embeddings can be had again, their window stays.
        """
        encoding = self.encoding
        again = encoding.cached or encoding.beside
        encoding.advance(max(step, encoding.window.start) if again and encoding.window else step, saved=True)

    def rebuild(self) -> None:
        """Start new learners. Samplers and reward servers stay; their current results are dropped."""
        self.pipeline.drop()
        self.encoding.lost(self.learners.lost)
        self.learners.lost = []
        self.learners.rebuild()

    def stop(self) -> None:
        """End all actors and free their placement groups."""
        if self._encoding is not None:
            self._encoding.end()
        for pool in self.pools.values():
            pool.stop()
        self._encoding, self.pools = None, {}
        if self._learners is not None:
            self._learners.stop()
            self._learners = None

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def counted(hosts: Sequence[str]) -> str:
    """Format hosts as `a, b (2)`: each once, in order, with the number of processes if it is not one."""
    return ", ".join(host if n == 1 else f"{host} ({n})" for host, n in Counter(hosts).items())


def _get(ref: Ref, what: str, timeout: float) -> Any:
    """`ray.get`. Raises RunFailed with a readable message on a failure or a timeout."""
    try:
        return ray.get(ref, timeout=timeout)
    except GetTimeoutError as error:
        raise RunFailed(f"{what} did not answer within {timeout:.0f} s") from error
    except RayError as error:
        raise RunFailed(f"{what} failed: {cause(error)}") from error
