"""Actors that misbehave on purpose: real ones with one thing broken. Tests put them in the place of the real ones."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
import torch
from torch import Tensor

from actors import fleet, learner_group
from actors.learner import LearnerActor
from actors.reward import RewardActor
from actors.sampler import SamplerActor
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.messages import Item, Packed, Rollout, RolloutReport, pack, unpack
from flowbp_ray.weights import buckets
from flowbp_ray.weights.packing import PackedTensors

BAD_SAMPLE, BAD_NODE = 2, 3
SMALL = 2 * 2**20  # bytes of a bucket


@contextmanager
def instead(module: Any, name: str, actor: type) -> Iterator[None]:
    """Put `actor` in the place of a remote class, e.g. instead(fleet, "RemoteSampler", SleepySampler)."""
    original = getattr(module, name)
    setattr(module, name, ray.remote(actor))
    try:
        yield
    finally:
        setattr(module, name, original)


class SleepySampler(SamplerActor):
    """Answers after a random while."""

    def rollout(self, item: Item, *rest: Any) -> tuple[RolloutReport, Rollout, Packed]:
        time.sleep(random.random() * 0.5)
        return super().rollout(item, *rest)


class HangingSampler(SamplerActor):
    """Does not answer in step 1."""

    def rollout(self, item: Item, *rest: Any) -> tuple[RolloutReport, Rollout, Packed]:
        while item.step == 1:
            time.sleep(1.0)
        return super().rollout(item, *rest)


class SleepyReward(RewardActor):
    """Answers after a random while."""

    def score(self, *arguments: Any) -> Any:
        time.sleep(random.random() * 0.5)
        return super().score(*arguments)


class NanVelocitySampler(SamplerActor):
    """The velocity of sample BAD_SAMPLE of step 1 is NaN at node BAD_NODE."""

    def rollout(self, item: Item, *rest: Any) -> tuple[RolloutReport, Rollout, Packed]:
        backbone = self.sampler.backbone
        predict, calls = type(backbone).predict, [0]

        def broken(transformer: Any, x: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
            v = predict(backbone, transformer, x, sigma, conditioning)
            if item.step == 1 and BAD_SAMPLE in item.samples and calls[0] == BAD_NODE:
                v[item.samples.index(BAD_SAMPLE)] = float("nan")
            calls[0] += 1
            return v

        backbone.predict = broken  # type: ignore[method-assign]
        return super().rollout(item, *rest)


class NanScoreReward(RewardActor):
    """The score of sample BAD_SAMPLE of step 1 is NaN."""

    def score(self, item: Item, prompts: list[str], report: RolloutReport, target: Packed) -> Any:
        _, reward = self.scorer.trained[0]
        score = type(reward).score

        def broken(images: Tensor, texts: Sequence[str]) -> Tensor:
            values = score(reward, images, texts)
            factors = torch.ones_like(values)
            if item.step == 1 and BAD_SAMPLE in item.samples:
                factors[item.samples.index(BAD_SAMPLE)] = float("nan")
            return values * factors

        reward.score = broken  # type: ignore[method-assign]
        return super().score(item, prompts, report, target)


class NanEvaluationReward(RewardActor):
    """After the last step no score of an evaluation is finite; before it all are."""

    def __init__(self, config: RunConfig, *rest: Any) -> None:
        super().__init__(config, *rest)
        self.steps = config.steps

    def evaluate(self, item: Item, *rest: Any) -> Any:
        found = super().evaluate(item, *rest)
        if item.step < self.steps:
            return found
        nothing = {name: (float("nan"),) * len(values) for name, values in found.scores.items()}
        return replace(found, scores=nothing)


class InfiniteCotangentReward(RewardActor):
    """The score of sample BAD_SAMPLE of step 1 is finite, its gradient is not (a root at zero)."""

    def score(self, item: Item, prompts: list[str], report: RolloutReport, target: Packed) -> Any:
        _, reward = self.scorer.trained[0]
        score = type(reward).score

        def broken(images: Tensor, texts: Sequence[str]) -> Tensor:
            values = score(reward, images, texts)
            if item.step == 1 and BAD_SAMPLE in item.samples:
                row = item.samples.index(BAD_SAMPLE)
                zero = (images[row] * 0.0).sum().sqrt()
                values = torch.stack([v + zero if i == row else v for i, v in enumerate(values)])
            return values

        reward.score = broken  # type: ignore[method-assign]
        return super().score(item, prompts, report, target)


class OverflowingLearner(LearnerActor):
    """In step 1 the gradient of the first row overflows fp32: its cotangent is huge."""

    def step(self, step: int, factors: Sequence[float], shares: Sequence[float], *messages: Any) -> Any:
        at = next(i for i, message in enumerate(messages) if isinstance(message, Packed))  # the first cotangent
        if step == 1:
            first = unpack(messages[at]).clone()
            first[0] *= 3e38 / first[0].abs().max()  # ZeRO-3 sums squares in fp64: a huge norm would be one
            messages = (*messages[:at], pack(first), *messages[at + 1 :])
        return super().step(step, factors, shares, *messages)


class ForgetfulLearner(LearnerActor):
    """A bucket of what it publishes is that of the first version."""

    kept: Any = None

    def publish(self, ema: bool = False) -> Any:
        *packed, seconds = super().publish(ema)
        tensors = packed[0].tensors()
        name = sorted(tensors)[len(tensors) // 2]
        self.kept = tensors[name].clone() if self.kept is None else self.kept
        return PackedTensors.of({**tensors, name: self.kept}), *packed[1:], seconds


class DroppingLearner(LearnerActor):
    """A tensor is missing from what it publishes."""

    def publish(self, ema: bool = False) -> Any:
        *packed, seconds = super().publish(ema)
        tensors = packed[0].tensors()
        return PackedTensors.of(dict(list(tensors.items())[1:])), *packed[1:], seconds


class AveragingLearner(LearnerActor):
    """Publishes the average where the weights were asked for."""

    def publish(self, ema: bool = False) -> Any:
        return super().publish(True)


class CountingLearner(LearnerActor):
    """Small buckets; notes how many bytes of sharded parameters are whole while each of its buckets is published."""

    whole: list[int]

    def build(self, *arguments: Any) -> str:
        buckets.BUCKET = SMALL
        return super().build(*arguments)

    def publish(self, ema: bool = False) -> Iterator[Any]:
        self.whole = []
        for found in super().publish(ema):
            self.whole.append(self.whole_bytes())
            yield found

    def whole_bytes(self) -> int:
        parameters: Any = self.learner.engine.named.values()  # type: ignore[attr-defined]
        return sum(p.nbytes for p in parameters if hasattr(p, "ds_id") and not p.ds_persist)

    def most_whole(self) -> int:
        return max(self.whole)


SAMPLERS, REWARDS, LEARNERS = (fleet, "RemoteSampler"), (fleet, "RemoteReward"), (learner_group, "RemoteLearner")
