"""A step with terms without gradient in one process, and its gradient written out as a loss for autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.control.selection import Selection, select
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import Item, Optimality, Packed, Rollout, ScoredItem, StepReport, unpack
from flowbp_ray.utils import random
from flowbp_ray.weights import trainable
from flowbp_ray.weights.packing import PackedTensors
from tests.backbones.families import run_config
from tests.conftest import Saved
from tests.small import small_config

LORA = ["learners.lora={rank: 4, alpha: 8}"]
RED = "{name: red, kind: 'tests.learning.forward_steps:Red', gradient: none}"
EMBEDDED = ("flux1",)
"""Families whose guidance is an input of the model."""


class Red:
    """How much redder than blue a picture is: a score that differs from picture to picture, without gradient."""

    differentiable = False

    def __init__(self, device: str = "cpu") -> None:
        self.name, self.device = "red", device

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images[:, 0] - images[:, 2]).mean(dim=(1, 2))


def config_of(family: str, saved: Saved, folder: Path, *overrides: str) -> RunConfig:
    """Two prompts of three images, two times for each, learned from `Red` alone; all in one item."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = ["method=null", f"rewards.terms=[{RED}]", "data.prompts_per_step=2", "data.images_per_prompt=3"]
    ours += ["data.rollout_batch=6", "learners.micro_batch=2", *overrides]
    if family != "shapes":
        return run_config(family, saved(family)[0], folder, "flowbp_sparse", *ours)
    return small_config(folder, "flowbp_sparse", "backbone.num_steps=4", "data.prompts=shapes:train", *ours)


def moved(loop: LocalLoop) -> LocalLoop:
    """The learner some way from the policy that its published weights stand for, as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainable.trained(loop.learner.engine.module).values():
            p.add_((0.02 * torch.randn(p.shape, generator=generator)).to(p.dtype))
    return loop


@dataclass
class Step:
    """The inputs of a learner's step, and the gradient that it summed."""

    loop: LocalLoop
    items: list[ScoredItem] = field(default_factory=list)
    chosen: Selection | None = None

    @staticmethod
    def of(loop: LocalLoop, away: bool = True) -> Step:
        """Draw and score step 0 with the weights as they are; away: the learner then moves."""
        published, step, config = [PackedTensors.of(loop.learner.engine.weights())], Step(loop), loop.config
        for item in loop.items(0):
            report, rollout, target = loop.sampler.rollout(item, lambda: published)
            scored, cotangent = loop.scorer.score(item, [loop.texts[i] for i in item.prompt_ids], report, target)
            step.items.append(ScoredItem(item, report, scored, rollout, cotangent))
        step.chosen = select(step.items, (), config.rewards, None, config.nonfinite).beside(step.items, config)
        if away:
            moved(loop)
        return step

    @property
    def rollouts(self) -> list[Rollout]:
        return [item.rollout for item in self.items]

    @property
    def cotangents(self) -> list[Packed]:
        return [item.cotangent for item in self.items]

    @property
    def optimality(self) -> Optimality | None:
        assert self.chosen is not None
        return self.chosen.optimality(1, self.loop.config)[0]

    def gradient(self, optimality: Optimality | None, factors: Sequence[float]) -> tuple[StepReport, Tensor]:
        """What is summed when the engine is asked to step; nothing is updated."""
        engine, found = self.loop.learner.engine, []

        def read(rate: float) -> float:
            rows = {name: p.grad for name, p in trainable.trained(engine.module).items()}
            found.append(flat({n: torch.zeros(1) if g is None else g for n, g in rows.items()}.values()))
            engine.module.zero_grad(set_to_none=True)
            return float(found[0].norm())

        engine.step = read  # type: ignore[method-assign]
        report = self.loop.learner.step(0, self.rollouts, self.cotangents, factors, (), optimality)
        return report, found[0]

    def all(self) -> tuple[StepReport, Tensor]:
        """As `gradient`, with all that the driver would hand over."""
        assert self.chosen is not None
        return self.gradient(self.optimality, self.chosen.factors)

    def written_out(self, r: Sequence[float], factors: Sequence[float], penalty: float = 0.0) -> Tensor:
        """The gradient by autograd of the loss as arXiv 2509.16117 and its code state it, one state at a time.

        r: per row, NaN for one that is left out. penalty: weight of the mean square of v − v_base.
        """
        total = torch.zeros((), dtype=torch.float64)
        for scored in self.items:
            for place, sample in enumerate(scored.item.samples):
                if math.isnan(r[sample]) or not factors[sample]:
                    continue
                losses = self._losses(scored.item, scored.rollout, place, r[sample], penalty)
                total = total + factors[sample] / len(factors) * torch.stack(losses).mean()
        module = self.loop.learner.engine.module
        parameters = list(trainable.trained(module).values())
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        return flat(torch.zeros(1) if g is None else g for g in found)

    def _losses(self, item: Item, rollout: Rollout, place: int, r: float, penalty: float) -> list[Tensor]:
        """Of one sample, at each of its times."""
        config, sample, sigmas = self.loop.config, item.samples[place], self.loop.learner.sigmas
        beta, clip, count = config.nft.beta, config.nft.clip, config.nft.times
        nodes = random.stream(config.plan_seed, "times", 0, sample).choice(len(sigmas) - 1, count, replace=False)
        assert rollout.finished is not None
        kept = unpack(rollout.finished)[place]
        x0 = kept.float()
        eps = random.stream(config.seed, "forward", 0, sample).standard_normal((count, *x0.shape), dtype="float32")
        losses = []
        for noise, node in zip(torch.from_numpy(eps), sorted(nodes.tolist()), strict=True):
            t = sigmas[node]
            x_t = ((1 - t) * x0 + t * noise).to(kept.dtype)
            v = self._velocity(self.loop.learner.engine.module, x_t, node, item.prompt_ids[place]).double()
            with torch.no_grad():
                old = self._velocity(self.loop.sampler.transformer, x_t, node, item.prompt_ids[place]).double()
            clean, exact, t = x0.double(), ((1 - t) * x0 + t * noise).double(), t.double()
            parts = []
            for guess in (exact - t * ((1 - beta) * old + beta * v), exact - t * ((1 + beta) * old - beta * v)):
                weight = (guess - clean).abs().mean().clip(min=1e-5).detach()
                parts.append(((guess - clean) ** 2 / weight).mean())
            losses.append(clip / beta * (r * parts[0] + (1 - r) * parts[1]))
            if penalty:
                base = self.loop.sampler.frozen
                assert base is not None
                with torch.no_grad():
                    theirs = self._velocity(base, x_t, node, item.prompt_ids[place]).double()
                losses[-1] = losses[-1] + penalty * (v - theirs).square().mean()
        return losses

    def _velocity(self, module: torch.nn.Module, x: Tensor, node: int, prompt: int) -> Tensor:
        """The conditional velocity at one state; at the run's guidance only where that is an input of the model."""
        learner, guidance = self.loop.learner, self.loop.config.backbone.guidance
        cond = learner.backbone.trim(learner.embeddings.rows([prompt]))
        if self.loop.config.backbone.name in EMBEDDED:
            cond = dict(cond) | {"guidance": torch.full((1,), float(guidance))}
        return learner.backbone.predict(module, x[None], learner.sigmas[node : node + 1], cond)[0]


def optimality_of(scores: Sequence[float], images: int, clip: float) -> list[float]:
    """r of §3 of the paper, plainly: ½ + ½·clip(advantage / clip, −1, 1) by the standard deviation of the batch."""
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    found = []
    for row, score in enumerate(scores):
        group = scores[row // images * images :][:images]
        advantage = (score - sum(group) / images) / std
        found.append(0.5 + 0.5 * max(-1.0, min(1.0, advantage / clip)))
    return found


def flat(gradients: object) -> Tensor:
    return torch.cat([g.double().flatten() for g in gradients])  # type: ignore[attr-defined]


def relative(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return float((value - expected).norm() / expected.norm())
