"""The reward server's side as a plain object: the decoder and the rewards, scores out, one cotangent back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from flowbp_ray.backbones.base import uint8_images
from flowbp_ray.backbones.decoding import Decoding
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.rewards import RewardConfig, RewardsConfig
from flowbp_ray.config.sections import BackboneConfig
from flowbp_ray.messages import Evaluated, Fault, Item, Packed, RolloutReport, Scored, pack, unpack
from flowbp_ray.rewards import base
from flowbp_ray.rewards.base import build
from flowbp_ray.rewards.jitter import KeyedJitter
from flowbp_ray.rewards.objective import RewardTerm, score_and_cotangent
from flowbp_ray.rewards.offload import Offloaded
from flowbp_ray.rewards.precision import computing, with_dtype
from flowbp_ray.surrogate import append_dims


class Scorer:
    """Decodes targets, scores them, and answers with the gradient of the global-batch loss at each."""

    def __init__(self, backbone: BackboneConfig, rewards: RewardsConfig, batch: int) -> None:
        """batch: rows of the global batch, by which each row's loss is divided."""
        self.config, self.batch, self.device = rewards, batch, rewards.device
        self.size = backbone.height, backbone.width
        self.decode = build_backbone(backbone).load_decoder(self.device, Decoding.of(rewards))
        self.rewards = {r.name: build(r.factory, self.device, **_options(r, rewards)) for r in rewards.all}
        self.parked = Offloaded([self.decode, *self.rewards.values()], self.device) if rewards.offload else None
        self.trained = [
            (RewardTerm(t.name, t.weight, t.clip, t.scale), self.rewards[t.name]) for t in rewards.differentiable
        ]
        self.scored = [(term.name, self.rewards[term.name]) for term in rewards.scored if not term.judged]

    def _computing(self) -> ExitStack:
        """The context of a call: the precision of its products, and with `rewards.offload` its models on the device."""
        context = ExitStack()
        context.enter_context(computing(self.config.precision))
        if self.parked is not None:
            context.enter_context(self.parked.here())
        return context

    def reach(self) -> None:
        """Does nothing: the rewards are in this process."""

    def score(self, item: Item, prompts: Sequence[str], report: RolloutReport, target: Packed) -> tuple[Scored, Packed]:
        """Scores of target [rows, branches, ...] and dL/dtarget in fp32. Rows that were masked have omega 0."""
        started = time.perf_counter()
        jitter = None
        if self.config.jitter.noise or self.config.jitter.shift:
            jitter = KeyedJitter(item.seed, item.step, self.config.jitter.noise, self.config.jitter.shift, item.samples)
        latents = unpack(target).to(self.device)
        with self._computing():
            result = score_and_cotangent(
                latents,
                self.decode,
                self.trained,
                prompts,
                torch.tensor(report.omega) * torch.tensor(report.kept),
                self.batch,
                self.config.at_once(latents.shape[0] * latents.shape[1], *self.size),
                jitter,
                separate=self.config.balance != "none",
                scored=self.scored,
            )
        cotangent = pack(result.cotangent)
        scored = Scored(
            step=item.step,
            index=item.index,
            scores={name: tuple(tuple(row) for row in s.tolist()) for name, s in result.scores.items()},
            losses=tuple(result.losses.tolist()),
            clipped=result.clipped,
            gram=tuple(tuple(tuple(line) for line in row) for row in result.gram.tolist()),
            cotangent_bytes=cotangent.nbytes,
            seconds=time.perf_counter() - started,
            faults=tuple(
                Fault(what, item.step, item.samples[row], item.prompt_ids[row], reward=name)
                for row, what, name in result.bad
            ),
        )
        return scored, cotangent

    def pictures(self, target: Packed) -> np.ndarray:
        """What a gate sees of target [rows, branches, ...]: [rows, H, W, 3] uint8, of the first branch, without jitter.

        Decoded once more, without a graph. A latent that is not finite is decoded as zeros; its row counts for nothing.
        """
        latents = torch.nan_to_num(unpack(target)[:, 0].to(self.device), 0.0, 0.0, 0.0)
        with torch.no_grad(), self._computing():
            return np.concatenate([uint8_images(self.decode(part)) for part in self._parts(latents)])

    def evaluate(self, item: Item, prompts: Sequence[str], latents: Packed) -> Evaluated:
        """Scores of finished latents by every reward and monitor, and the pictures as uint8; no gradient.

        A latent that is not finite scores NaN and is decoded as zeros.
        """
        started = time.perf_counter()
        finished = unpack(latents).to(self.device)
        good = torch.isfinite(finished).flatten(1).all(dim=1)
        found: dict[str, list[torch.Tensor]] = {name: [] for name in self.rewards}
        pictures, texts = [], list(prompts)
        with torch.no_grad(), self._computing():
            for part in self._parts(finished.where(append_dims(good, finished.dim()), 0.0)):
                images, here = self.decode(part), texts[: len(part)]
                for name, reward in self.rewards.items():
                    found[name].append(reward.score(images, here).float().cpu())
                pictures.append(uint8_images(images))
                del texts[: len(part)]
        known = good.cpu()
        scores = {name: tuple(torch.cat(parts).where(known, torch.nan).tolist()) for name, parts in found.items()}
        drawn, seconds = tuple(known.tolist()), time.perf_counter() - started
        return Evaluated(item.index, scores, drawn, np.concatenate(pictures), seconds)

    def _parts(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Latents [B, ...] in parts that are decoded at once."""
        return latents.split(self.config.at_once(len(latents), *self.size))


def _options(reward: RewardConfig, rewards: RewardsConfig) -> dict[str, Any]:
    return with_dtype(base.factory(reward.factory), reward.options, rewards.precision)


def check_rewards(rewards: RewardsConfig, evaluated: Sequence[str] = (), trained: Sequence[str] = ()) -> None:
    """Raises ValueError for a reward that could not be built here, or judge the prompts.

    evaluated: prompts of the evaluations, for all. trained: those of the training, for terms.
    """
    terms = {term.name for term in rewards.terms}
    for term in rewards.differentiable:
        base.check_trainable(term.factory)
    for reward in rewards.all:
        base.check(reward.factory, _options(reward, rewards), rewards.device)
        texts = [*evaluated, *(trained if reward.name in terms else ())]
        base.check_prompts(reward.factory, reward.options, texts)
