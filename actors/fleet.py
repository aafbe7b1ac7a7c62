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
from actors.encoder import RemoteEncoder
from actors.errors import Ref, cause
from actors.learner_group import LearnerGroup
from actors.pipeline import Pipeline, wait_for_any
from actors.placement import free, place
from actors.process import REAL, Roles, actor_options
from actors.queue_stats import QueueStats
from actors.reward import RemoteReward
from actors.sampler import RemoteSampler
from flowbp_ray.backbones import distinct
from flowbp_ray.backbones.embeddings import Encoded
from flowbp_ray.config.rewards import RewardsConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.rewards.remote.client import assigned
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.utils.files import cache_path
from flowbp_ray.utils.settings import PoolConfig, ProcessConfig

ENCODED_AT_ONCE = 32  # prompts per call of the encoder; cluster.stall_timeout applies to one call


class Fleet:
    """The encoder (which ends after start-up), samplers, reward servers and learners. Use it as a context manager."""

    learners: LearnerGroup
    pipeline: Pipeline
    encoded: Encoded

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[str],
        agreed: Mapping[str, str] | None = None,
        roles: Roles = REAL,
        notify: Callable[[str], None] = lambda line: None,
    ) -> None:
        """agreed: the result of `handshake.check`, for remote reward servers. notify: takes what is waited for."""
        self.config, self.agreed, self.roles, self.notify = config, agreed or {}, roles, notify
        self._encoding: Encoding | None = None
        self.pools: dict[str, ElasticPool] = {}
        self.hosts: dict[str, list[str]] = {}  # role -> host on which each process started
        self._learners: LearnerGroup | None = None
        self._pipeline: Pipeline | None = None
        try:
            self._start(config, list(prompts))
        except BaseException:
            self.stop()
            raise

    def _start(self, config: RunConfig, prompts: list[str]) -> None:
        timeout = config.cluster.stall_timeout
        self.notify("placing the encoder")
        encoding = self._encoding = Encoding(config, prompts, self.roles)
        self.embeddings = encoding.embeddings
        if config.encoder.gpus:  # the other actors may need its GPU
            self.encoded = encoding.finish(timeout, self.notify)
        self.notify(f"placing the learners ({config.learners.count})")
        self.learners = self._learners = LearnerGroup(config, self.roles, self.notify, self._wait)
        samplers = self._pool("sampler", "samplers", self.roles.sampler or RemoteSampler, config.samplers)
        reward = self.roles.reward or RemoteReward
        scorers = self._pool("reward server", "rewards", reward, config.rewards, self.agreed)
        built = self.learners.launch(self.embeddings)
        if not config.encoder.gpus:  # the other actors have been starting while it encoded
            self.encoded = encoding.finish(timeout, self.notify)
        for who, refs in (
            ("learners", built),
            ("samplers", [h.ready.remote() for h in samplers.handles]),
            ("reward servers", [h.ready.remote() for h in scorers.handles]),
        ):
            self.hosts[who] = []
            for ref in refs:
                self.notify(f"building the {who}: {len(self.hosts[who])} of {len(refs)}")
                self.hosts[who].append(_get(ref, f"the {who}", timeout))
        if config.broadcasts and self.roles.learner is None:
            self.learners.broadcasts = Broadcasts(samplers, config.staleness, timeout)
        tries, gated = config.cluster.tries, config.has_gate
        self.queues = QueueStats(self.notify)
        pools = (samplers, scorers)
        self.pipeline = self._pipeline = Pipeline(
            *pools, [self.embeddings], prompts, tries, timeout, gated, self.queues.observe
        )

    def _wait(self, refs: Sequence[Ref], timeout: float) -> tuple[list[Ref], list[Ref]]:
        """`ray.wait` for the learners' calls; once there is a pipeline, it keeps working on its items while waiting."""
        if self._pipeline is None:
            return wait_for_any(refs, timeout)
        return self._pipeline.wait_for(refs, timeout)

    def _pool(self, name: str, key: str, remote: Any, pool: PoolConfig, *more: Any) -> ElasticPool:
        """Start the actors of a pool. more: constructor arguments after the configuration."""
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
        )
        return self.pools[key]

    def log_start(self, log: logging.Logger) -> None:
        """Log the encoder's report and the hosts of all roles. It is also where broadcasts of weights are logged."""
        log.info("embeddings: %s", self.encoded.describe())
        if self.learners.broadcasts is not None:
            self.learners.broadcasts.log = log
        elif self.config.cluster.transport != "object_store":
            log.info(
                "weights travel by the object store: adapters are small, and emulated actors have none to broadcast"
            )
        log.info("%s", "; ".join(f"{who} on {counted(hosts)}" for who, hosts in self.hosts.items()))

    def rebuild(self) -> None:
        """Start new learners. Samplers and reward servers stay; their current results are dropped."""
        self.pipeline.drop()
        self.learners.rebuild(self.embeddings)

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


class Encoding:
    """The calls to the encoder process: the prompts part by part, then the table of all embeddings."""

    def __init__(self, config: RunConfig, prompts: list[str], roles: Roles) -> None:
        encoder, texts = config.encoder, distinct(prompts)
        folder = cache_path(encoder.cache)  # resolved here: the encoder's node may have another environment
        here = encoder.model_copy(update={"cache": folder and str(folder)})
        pool = PoolConfig(count=1, **{key: getattr(encoder, key) for key in ProcessConfig.model_fields})
        self.group = place(pool, "the encoder", "encoder", config.cluster.placement_timeout)
        self.actor = (
            (roles.encoder or RemoteEncoder)
            .options(**actor_options(encoder, restarts=0, group=self.group))
            .remote(roles.settings(config.model_copy(update={"encoder": here})))
        )
        parts = range(0, len(texts), ENCODED_AT_ONCE)
        self.count = len(texts)
        self.parts = [self.actor.add.remote(texts[i : i + ENCODED_AT_ONCE]) for i in parts]
        self.whole, self.embeddings = self.actor.table.options(num_returns=2).remote(prompts)

    def finish(self, timeout: float, notify: Callable[[str], None] = lambda line: None) -> Encoded:
        """Wait for all parts, at most `timeout` seconds each, end the process, and return its report."""
        for number, part in enumerate(self.parts):
            notify(f"encoding prompts: {number * ENCODED_AT_ONCE} of {self.count}")
            encoded: Encoded = _get(part, "the encoder", timeout)
        _get(self.whole, "the encoder", timeout)
        self.end()
        return encoded

    def end(self) -> None:
        ray.kill(self.actor)
        free(self.group)


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
