"""The actors of a run: placed, built and ended together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.encoder import RemoteEncoder
from actors.errors import cause
from actors.gang import Gang
from actors.pipeline import Pipeline
from actors.placement import free, place
from actors.pool import Pool
from actors.process import actor_options
from actors.reward import RemoteReward
from actors.sampler import RemoteSampler
from flowbp_ray.backbones import distinct
from flowbp_ray.config import RunConfig
from flowbp_ray.embedding_cache import cache_path
from flowbp_ray.embeddings import Encoded
from flowbp_ray.failure import RunFailed
from flowbp_ray.remote.client import assigned
from flowbp_ray.reward_settings import RewardsConfig
from flowbp_ray.settings import PoolConfig

RESTARTS = -1  # samplers and reward servers hold nothing that cannot be built again
ENCODED_AT_ONCE = 32  # prompts per call of the encoder: cluster.stall_timeout is for these, not for all of them


class Fleet:
    """Encoder (for a moment), samplers, reward servers, learner gang. Use as a context manager."""

    gang: Gang
    pipeline: Pipeline
    encoded: Encoded

    def __init__(self, config: RunConfig, prompts: Sequence[str], agreed: Mapping[str, str] | None = None) -> None:
        """agreed: what `agreement.check` returned, for reward servers elsewhere."""
        self.config, self.agreed = config, agreed or {}
        self.handles: list[Any] = []
        self.groups: list[Any] = []
        self._gang: Gang | None = None
        try:
            self._start(config, list(prompts))
        except BaseException:
            self.stop()
            raise

    def _start(self, config: RunConfig, prompts: list[str]) -> None:
        timeout = config.cluster.stall_timeout
        encoding = Encoding(config, prompts)
        self.handles.append(encoding.actor)
        self.embeddings = encoding.embeddings
        if config.encoder.gpus:  # which the others may be waiting for
            self.encoded = encoding.finish(timeout)
        self.gang = self._gang = Gang(config)
        samplers = self._pool("sampler", "samplers", RemoteSampler, config.samplers)
        scorers = self._pool("reward server", "rewards", RemoteReward, config.rewards, self.agreed)
        built = self.gang.launch(self.embeddings)
        if not config.encoder.gpus:  # they were starting meanwhile
            self.encoded = encoding.finish(timeout)
        for what, refs in (
            ("the learners", built),
            ("the samplers", [h.ready.remote() for h in samplers.handles]),
            ("the reward servers", [h.ready.remote() for h in scorers.handles]),
        ):
            for ref in refs:
                _get(ref, what, timeout)
        tries, gated = config.cluster.tries, config.gated
        self.pipeline = Pipeline(samplers, scorers, [self.embeddings], prompts, tries, timeout, gated)

    def _pool(self, name: str, key: str, remote: Any, pool: PoolConfig, *more: Any) -> Pool:
        """`pool.count` actors; more: what their class takes after the configuration."""
        group = place(pool, f"{name}s", key, self.config.cluster.placement_timeout)
        self.groups.append(group)
        handles = [
            remote.options(**actor_options(pool, RESTARTS, group, i)).remote(assigned(self.config, i), *more)
            for i in range(pool.count)
        ]
        self.handles += handles
        urls = pool.url if isinstance(pool, RewardsConfig) else None
        return Pool(name, handles, [urls[i % len(urls)] for i in range(pool.count)] if urls else None)

    def rebuild(self) -> None:
        """A new gang; samplers and reward servers stay, what they are doing for the old one is forgotten."""
        self.pipeline.drop()
        self.gang.rebuild(self.embeddings)

    def stop(self) -> None:
        """End every actor and give the placement back."""
        for handle in self.handles:
            ray.kill(handle)
        for group in self.groups:
            free(group)
        self.handles, self.groups = [], []
        if self._gang is not None:
            self._gang.stop()
            self._gang = None

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Encoding:
    """The encoder's process at work: a part of the prompts after the other, then the table of all of them."""

    def __init__(self, config: RunConfig, prompts: list[str]) -> None:
        encoder, texts = config.encoder, distinct(prompts)
        folder = cache_path(encoder.cache)  # which this process's environment may name: the encoder's need not
        here = encoder.model_copy(update={"cache": folder and str(folder)})
        self.actor = RemoteEncoder.options(**actor_options(encoder, restarts=0)).remote(
            config.model_copy(update={"encoder": here})
        )
        parts = range(0, len(texts), ENCODED_AT_ONCE)
        self.parts = [self.actor.add.remote(texts[i : i + ENCODED_AT_ONCE]) for i in parts]
        self.whole, self.embeddings = self.actor.table.options(num_returns=2).remote(prompts)

    def finish(self, timeout: float) -> Encoded:
        """Wait for each part, at most `timeout` seconds, and end the process."""
        encoded: Encoded = [_get(part, "the encoder", timeout) for part in self.parts][-1]
        _get(self.whole, "the encoder", timeout)
        ray.kill(self.actor)
        return encoded


def _get(ref: Any, what: str, timeout: float) -> Any:
    """ray.get with a cause that a person can read."""
    try:
        return ray.get(ref, timeout=timeout)
    except GetTimeoutError as error:
        raise RunFailed(f"{what} did not answer within {timeout:.0f} s") from error
    except RayError as error:
        raise RunFailed(f"{what} failed: {cause(error)}") from error
