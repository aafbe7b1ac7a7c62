"""The actors of a run: placed, built and ended together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import transport
from actors.encoder import RemoteEncoder
from actors.learner import RemoteLearner
from actors.pipeline import Job, Pipeline, RunFailed
from actors.pool import Pool
from actors.process import thread_env
from actors.reward import RemoteReward
from actors.sampler import RemoteSampler
from flowbp_ray.config import PoolConfig, RunConfig
from flowbp_ray.messages import StepReport, Version

RESTARTS = -1  # samplers and reward servers hold nothing that cannot be built again
PLACEMENT_TIMEOUT = 30.0


class Fleet:
    """Encoder (for a moment), samplers, reward servers, learner gang. Use as a context manager."""

    def __init__(self, config: RunConfig, prompts: Sequence[str]) -> None:
        self.config = config
        self.group: Any = None
        self.handles: list[Any] = []
        try:
            self._start(config, list(prompts))
        except BaseException:
            self.stop()
            raise

    def _start(self, config: RunConfig, prompts: list[str]) -> None:
        learners = config.learners
        bundle = {"CPU": learners.cpus} | ({"GPU": learners.gpus} if learners.gpus else {})
        self.group = placement_group([bundle] * learners.count, strategy="PACK")
        if not ray.wait([self.group.ready()], timeout=PLACEMENT_TIMEOUT)[0]:
            raise RunFailed(
                f"{learners.count} learners with {bundle} each cannot be placed within {PLACEMENT_TIMEOUT:.0f} s; "
                f"the cluster has {_resources()}; write a smaller learners.count, learners.cpus or learners.gpus"
            )
        encoder = RemoteEncoder.options(num_cpus=0.1, runtime_env={"env_vars": thread_env(1)}).remote(config)
        self.handles.append(encoder)
        self.embeddings = encoder.encode.remote(prompts)
        self.learners = [
            RemoteLearner.options(
                **_options(learners, restarts=0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(learners.count)
        ]
        self.handles += self.learners
        samplers = self._pool("sampler", RemoteSampler, config.samplers)
        scorers = self._pool("reward server", RemoteReward, config.rewards)
        address, port = _get(self.learners[0].rendezvous.remote(), "the first learner")
        built = [
            rank.build.remote(config, self.embeddings, number, address, port)
            for number, rank in enumerate(self.learners)
        ]
        for what, refs in (
            ("the encoder", [self.embeddings]),
            ("the learners", built),
            ("the samplers", [h.ready.remote() for h in samplers.handles]),
            ("the reward servers", [h.ready.remote() for h in scorers.handles]),
        ):
            for ref in refs:
                _get(ref, what, config.cluster.stall_timeout)
        ray.kill(encoder)
        limits = (config.cluster.tries, config.cluster.stall_timeout)
        self.pipeline = Pipeline(samplers, scorers, [self.embeddings], prompts, *limits)

    def _pool(self, name: str, remote: Any, pool: PoolConfig) -> Pool:
        handles = [remote.options(**_options(pool, RESTARTS)).remote(self.config) for _ in range(pool.count)]
        self.handles += handles
        return Pool(name, handles)

    def step(self, step: int, jobs: Sequence[Job], factor: float) -> list[StepReport]:
        """One optimizer step: each rank gets its consecutive share of the items, by reference."""
        share = len(jobs) // len(self.learners)
        refs = []
        for number, rank in enumerate(self.learners):
            mine = jobs[number * share : (number + 1) * share]
            refs.append(rank.step.remote(step, factor, *[j.rollout for j in mine], *[j.cotangent for j in mine]))
        limit = self.config.cluster.stall_timeout
        return [_get(ref, f"learner {rank} in step {step}", limit) for rank, ref in enumerate(refs)]

    def publish(self, version: Version) -> transport.Published:
        """The weights of `version`, as a reference for whoever needs them."""
        published = transport.publish(self.learners)
        if not ray.wait(published, timeout=self.config.cluster.stall_timeout, fetch_local=False)[0]:
            raise RunFailed(f"the learners did not publish version {version.step} in time")
        return published

    def save(self, folder: str) -> None:
        for ref in [rank.save.remote(folder) for rank in self.learners]:
            _get(ref, "a learner that saves", self.config.cluster.stall_timeout)

    def digest(self) -> str:
        """sha256 of the learners' weights."""
        answers = [rank.digest.remote() for rank in self.learners]
        return _get(answers[0], "the first learner")

    def stop(self) -> None:
        """End every actor and give the placement back."""
        for handle in self.handles:
            ray.kill(handle)
        self.handles = []
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _options(pool: PoolConfig, restarts: int) -> dict[str, Any]:
    return {
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
        "max_restarts": restarts,
        "runtime_env": {"env_vars": thread_env(pool.threads)},
    }


def _get(ref: Any, what: str, timeout: float = 600.0) -> Any:
    """ray.get with a cause that a person can read."""
    try:
        return ray.get(ref, timeout=timeout)
    except GetTimeoutError as error:
        raise RunFailed(f"{what} did not answer within {timeout:.0f} s") from error
    except RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise RunFailed(f"{what} failed: {lines[-1].strip() if lines else type(error).__name__}") from error


def _resources() -> str:
    total = ray.cluster_resources()
    return ", ".join(f"{total.get(key, 0):g} {key}" for key in ("CPU", "GPU"))
