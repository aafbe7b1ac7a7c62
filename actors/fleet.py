"""The actors of a run: placed, built and ended together."""

from __future__ import annotations

from collections.abc import Sequence
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
from flowbp_ray.config import PoolConfig, RunConfig
from flowbp_ray.embeddings import Encoded
from flowbp_ray.failure import RunFailed

RESTARTS = -1  # samplers and reward servers hold nothing that cannot be built again
ENCODED_AT_ONCE = 32  # prompts per call of the encoder: cluster.stall_timeout is for these, not for all of them


class Fleet:
    """Encoder (for a moment), samplers, reward servers, learner gang. Use as a context manager."""

    gang: Gang
    pipeline: Pipeline
    encoded: Encoded

    def __init__(self, config: RunConfig, prompts: Sequence[str]) -> None:
        self.config = config
        self.handles: list[Any] = []
        self.groups: list[Any] = []
        self._gang: Gang | None = None
        try:
            self._start(config, list(prompts))
        except BaseException:
            self.stop()
            raise

    def _start(self, config: RunConfig, prompts: list[str]) -> None:
        self.gang = self._gang = Gang(config)
        encoder = RemoteEncoder.options(**actor_options(config.encoder, restarts=0)).remote(config)
        self.handles.append(encoder)
        texts = distinct(prompts)
        parts = [encoder.add.remote(texts[i : i + ENCODED_AT_ONCE]) for i in range(0, len(texts), ENCODED_AT_ONCE)]
        whole, self.embeddings = encoder.table.options(num_returns=2).remote(prompts)
        samplers = self._pool("sampler", "samplers", RemoteSampler, config.samplers)
        scorers = self._pool("reward server", "rewards", RemoteReward, config.rewards)
        built = self.gang.launch(self.embeddings)
        timeout = config.cluster.stall_timeout
        self.encoded = [_get(part, "the encoder", timeout) for part in parts][-1]
        _get(whole, "the encoder", timeout)
        ray.kill(encoder)
        for what, refs in (
            ("the learners", built),
            ("the samplers", [h.ready.remote() for h in samplers.handles]),
            ("the reward servers", [h.ready.remote() for h in scorers.handles]),
        ):
            for ref in refs:
                _get(ref, what, timeout)
        self.pipeline = Pipeline(samplers, scorers, [self.embeddings], prompts, config.cluster.tries, timeout)

    def _pool(self, name: str, key: str, remote: Any, pool: PoolConfig) -> Pool:
        group = place(pool, f"{name}s", key)
        self.groups.append(group)
        handles = [
            remote.options(**actor_options(pool, RESTARTS, group, i)).remote(self.config) for i in range(pool.count)
        ]
        self.handles += handles
        return Pool(name, handles)

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


def _get(ref: Any, what: str, timeout: float) -> Any:
    """ray.get with a cause that a person can read."""
    try:
        return ray.get(ref, timeout=timeout)
    except GetTimeoutError as error:
        raise RunFailed(f"{what} did not answer within {timeout:.0f} s") from error
    except RayError as error:
        raise RunFailed(f"{what} failed: {cause(error)}") from error
