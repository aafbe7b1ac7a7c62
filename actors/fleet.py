"""The actors of a run: placed, built and ended together."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.elastic_pool import ElasticPool
from actors.encoder import RemoteEncoder
from actors.errors import cause
from actors.learner_group import LearnerGroup
from actors.pipeline import Pipeline
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

ENCODED_AT_ONCE = 32  # prompts per call of the encoder: cluster.stall_timeout is for these, not for all of them


class Fleet:
    """Encoder (for a moment), samplers, reward servers, learner group. Use as a context manager."""

    learners: LearnerGroup
    pipeline: Pipeline
    encoded: Encoded

    def __init__(
        self,
        config: RunConfig,
        prompts: Sequence[str],
        agreed: Mapping[str, str] | None = None,
        roles: Roles = REAL,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """agreed: what `handshake.check` returned, for reward servers elsewhere. say: takes what is waited for."""
        self.config, self.agreed, self.roles, self.say = config, agreed or {}, roles, say
        self._encoding: Encoding | None = None
        self.pools: dict[str, ElasticPool] = {}
        self.hosts: dict[str, list[str]] = {}  # where each process of a role began
        self._learners: LearnerGroup | None = None
        self._pipeline: Pipeline | None = None
        try:
            self._start(config, list(prompts))
        except BaseException:
            self.stop()
            raise

    def _start(self, config: RunConfig, prompts: list[str]) -> None:
        timeout = config.cluster.stall_timeout
        self.say("placing the encoder")
        encoding = self._encoding = Encoding(config, prompts, self.roles)
        self.embeddings = encoding.embeddings
        if config.encoder.gpus:  # which the others may be waiting for
            self.encoded = encoding.finish(timeout, self.say)
        self.say(f"placing the learners ({config.learners.count})")
        self.learners = self._learners = LearnerGroup(config, self.roles, self.say, self._wait)
        samplers = self._pool("sampler", "samplers", self.roles.sampler or RemoteSampler, config.samplers)
        reward = self.roles.reward or RemoteReward
        scorers = self._pool("reward server", "rewards", reward, config.rewards, self.agreed)
        built = self.learners.launch(self.embeddings)
        if not config.encoder.gpus:  # they were starting meanwhile
            self.encoded = encoding.finish(timeout, self.say)
        for who, refs in (
            ("learners", built),
            ("samplers", [h.ready.remote() for h in samplers.handles]),
            ("reward servers", [h.ready.remote() for h in scorers.handles]),
        ):
            self.hosts[who] = []
            for ref in refs:
                self.say(f"building the {who}: {len(self.hosts[who])} of {len(refs)}")
                self.hosts[who].append(_get(ref, f"the {who}", timeout))
        tries, gated = config.cluster.tries, config.has_gate
        self.queues = QueueStats(self.say)
        pools = (samplers, scorers)
        self.pipeline = self._pipeline = Pipeline(
            *pools, [self.embeddings], prompts, tries, timeout, gated, self.queues.look
        )

    def _wait(self, refs: Sequence[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        """`ray.wait` for the learners; once there is a pipeline its items go on meanwhile."""
        if self._pipeline is None:
            ready, left = ray.wait(list(refs), timeout=timeout)
            return ready, left
        return self._pipeline.wait_for(refs, timeout)

    def _pool(self, name: str, key: str, remote: Any, pool: PoolConfig, *more: Any) -> ElasticPool:
        """Start the actors of a pool; more: what their class takes after the configuration."""
        urls = pool.url if isinstance(pool, RewardsConfig) else None
        self.say(f"placing the {name}s ({pool.count})")
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

    def tell(self, log: logging.Logger) -> None:
        """What was encoded, and where everybody is."""
        log.info("embeddings: %s", self.encoded.describe())
        log.info("%s", "; ".join(f"{who} on {counted(hosts)}" for who, hosts in self.hosts.items()))

    def rebuild(self) -> None:
        """New learners; samplers and reward servers stay, what they are doing for the old ones is forgotten."""
        self.pipeline.drop()
        self.learners.rebuild(self.embeddings)

    def stop(self) -> None:
        """End every actor and give the placement back."""
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
    """The encoder's process at work: a part of the prompts after the other, then the table of all of them."""

    def __init__(self, config: RunConfig, prompts: list[str], roles: Roles) -> None:
        encoder, texts = config.encoder, distinct(prompts)
        folder = cache_path(encoder.cache)  # which this process's environment may name: the encoder's need not
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

    def finish(self, timeout: float, say: Callable[[str], None] = lambda line: None) -> Encoded:
        """Wait for each part, at most `timeout` seconds, and end the process."""
        for number, part in enumerate(self.parts):
            say(f"encoding prompts: {number * ENCODED_AT_ONCE} of {self.count}")
            encoded: Encoded = _get(part, "the encoder", timeout)
        _get(self.whole, "the encoder", timeout)
        self.end()
        return encoded

    def end(self) -> None:
        ray.kill(self.actor)
        free(self.group)


def counted(hosts: Sequence[str]) -> str:
    """`a, b (2)`: each host once, in the order of the processes, with their number where it is not one."""
    return ", ".join(host if n == 1 else f"{host} ({n})" for host, n in Counter(hosts).items())


def _get(ref: Any, what: str, timeout: float) -> Any:
    """ray.get with a cause that a person can read."""
    try:
        return ray.get(ref, timeout=timeout)
    except GetTimeoutError as error:
        raise RunFailed(f"{what} did not answer within {timeout:.0f} s") from error
    except RayError as error:
        raise RunFailed(f"{what} failed: {cause(error)}") from error
