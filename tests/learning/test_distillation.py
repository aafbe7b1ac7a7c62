"""A base at another guidance: the learner's gradient against autograd on each family, and that it is approached."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowbp_ray.backbones.base import Backbone, Conditioning
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import pack, unpack
from flowbp_ray.surrogate.nft import forward_states
from flowbp_ray.utils import random
from flowbp_ray.weights import trainable
from tests.backbones.families import relative, run_config
from tests.conftest import Saved
from tests.learning import forward_steps
from tests.learning.test_base_penalty import LORA, Step, config, moved
from tests.small import local_digest

WEIGHT = 0.5
CASES = [
    ("shapes", 1.0, 3.0, True, []),
    ("shapes", 1.0, 3.0, True, LORA),
    ("shapes", 3.0, 1.0, True, []),
    ("sd35", 1.0, 3.5, True, []),
    ("sd35", 2.0, 3.5, True, []),
    ("sd35", 2.0, 3.5, False, LORA),
    ("flux1", 1.0, 3.5, True, []),
    ("flux2", 1.0, 3.5, True, LORA),
    ("qwen_image", 1.0, 3.5, True, []),
    ("qwen_image", 2.0, 3.5, True, []),
]


def config_of(family: str, saved: Saved, folder: Path, *overrides: str) -> RunConfig:
    if family == "shapes":
        return config(folder, *overrides)
    return run_config(family, saved(family)[0], folder, "flowbp_bridge", *overrides)


class Pipeline:
    """The velocities that the family's pipeline in diffusers makes of a model's outputs at one state."""

    def __init__(self, backbone: Backbone, cond: Conditioning, negative: Conditioning) -> None:
        self.backbone, self.cond, self.negative = backbone, backbone.trim(cond), backbone.trim(negative)

    def output(self, module: torch.nn.Module, x: Tensor, sigma: Tensor, negative: bool = False) -> Tensor:
        return self.backbone.predict(module, x, sigma, self.negative if negative else self.cond)

    def embedded(self, module: torch.nn.Module, x: Tensor, sigma: Tensor, guidance: float) -> Tensor:
        cond = self.cond | {"guidance": torch.full((1,), guidance)}
        return self.backbone.predict(module, x, sigma, cond)

    def guided(self, cond: Tensor, negative: Tensor, guidance: float) -> Tensor:
        """uncond + g (cond − uncond); of QwenImagePipeline with the conditional's norm at each token."""
        v = negative + guidance * (cond - negative)
        if self.backbone.name == "qwen_image":
            v = v * (cond.square().sum(1, keepdim=True).sqrt() / v.square().sum(1, keepdim=True).sqrt())
        return v


def written_out(step: Step, learned: float, held: float, detach: bool) -> Tensor:
    """The penalty's gradient by autograd, with a base of its own from the files."""
    learner, model = step.loop.learner, step.loop.config.backbone
    backbone = backbone_named(model.name, model.path)
    base, module, terms = backbone.load_transformer(torch.float32), learner.engine.module, []
    for rollout in step.rollouts:
        states, place = unpack(rollout.states), 0
        for plan, prompt in zip(rollout.item.plans, rollout.item.prompt_ids, strict=True):
            pipe = Pipeline(backbone, learner.embeddings.rows([prompt]), learner.embeddings.negative(1))
            squares = []
            for node, _ in plan.states:
                x, sigma = states[place : place + 1], learner.sigmas[node : node + 1]
                place += 1
                if model.name == "flux1":
                    v, theirs = pipe.embedded(module, x, sigma, learned), pipe.embedded(base, x, sigma, held)
                else:
                    cond, negative = (pipe.output(module, x, sigma, negative) for negative in (False, True))
                    base_cond, base_negative = (pipe.output(base, x, sigma, negative) for negative in (False, True))
                    if detach:  # and where guidance is linear the negative is taken to be the base's
                        negative = negative.detach() if model.name == "qwen_image" else base_negative.detach()
                    v = pipe.guided(cond, negative, learned) if learned > 1 else cond
                    theirs = pipe.guided(base_cond, base_negative, held) if held > 1 else base_cond
                squares.append((v - theirs.detach()).square().mean())
            terms.append(torch.stack(squares).mean())
    found = torch.autograd.grad(
        WEIGHT * torch.stack(terms).mean(), list(trainable.trained(module).values()), allow_unused=True
    )
    return torch.cat([torch.zeros(1).double() if g is None else g.double().flatten() for g in found])


@pytest.mark.parametrize(("family", "learned", "held", "detach", "more"), CASES)
def test_the_gradient_is_that_of_the_distance_to_the_guided_base(
    saved: Saved, tmp_path: Path, family: str, learned: float, held: float, detach: bool, more: list[str]
) -> None:
    """Of a learner that has moved, with no cotangent from the reward; by sampler, messages and learner."""
    settings = [f"backbone.guidance={learned}", f"backbone.detach_negative={str(detach).lower()}", *more]
    penalty = f"learners.base_penalty={{weight: {WEIGHT}, guidance: {held}}}"
    step = Step.of(moved(LocalLoop(config_of(family, saved, tmp_path, *settings, penalty))))
    step.cotangents = [pack(torch.zeros_like(unpack(cotangent))) for cotangent in step.cotangents]
    _, found = step.gradient([1.0] * sum(rollout.item.rows for rollout in step.rollouts))
    want = written_out(step, learned, held, detach)
    assert float(want.norm()) > 0 and relative(found, want) <= 1e-4
    assert relative(written_out(step, learned, learned, detach), want) > 1e-3  # another guidance matters


def test_the_guided_base_is_approached_and_the_distance_begins_at_what_guidance_does(tmp_path: Path) -> None:
    """The same states again and again: the mean square of v − v_base falls with each step but for the rewards' pull."""
    penalty = ["learners.base_penalty={weight: 1000, guidance: 3}", "learners.optimizer.lr=1e-4"]
    step = Step.of(LocalLoop(config(tmp_path, *penalty, "steps=5")))
    learner, base = step.loop.learner, step.loop.sampler.frozen
    assert base is not None
    gaps = []
    for rollout in step.rollouts:
        x, place = unpack(rollout.states), 0
        for plan, prompt in zip(rollout.item.plans, rollout.item.prompt_ids, strict=True):
            squares = []
            for node, _ in plan.states:
                pipe = Pipeline(learner.backbone, learner.embeddings.rows([prompt]), learner.embeddings.negative(1))
                with torch.no_grad():
                    at = (base, x[place : place + 1], learner.sigmas[node : node + 1])
                    cond, negative = pipe.output(*at), pipe.output(*at, negative=True)
                squares.append((2 * (cond - negative)).square().mean())  # guidance 3 less the model as it is
                place += 1
            gaps.append(float(torch.stack(squares).mean()))
    found = [
        learner.step(i, step.rollouts, step.cotangents, [1.0] * 4).base_distance for i in range(5)
    ]  # each measured before its update
    assert found[0] == pytest.approx(gaps, rel=1e-3)
    means = [sum(distances) / 4 for distances in found]
    assert means == sorted(means, reverse=True) and means[-1] < 0.9 * means[0]


@pytest.mark.parametrize("family", ["shapes", "sd35", "flux1"])
def test_a_run_without_surrogate_is_held_to_it_at_the_noised_samples(saved: Saved, tmp_path: Path, family: str) -> None:
    """There too the base is guided, though what is learned is the conditional velocity, whatever the run's guidance."""
    settings = ["backbone.guidance=2", "learners.base_penalty={weight: 1, guidance: 2}"]
    loop = LocalLoop(forward_steps.config_of(family, saved, tmp_path, *settings))
    [rollout] = forward_steps.Step.of(loop, away=False).rollouts
    item, learner = rollout.item, loop.learner
    assert rollout.finished is not None and rollout.base is not None
    x0 = unpack(rollout.finished)
    eps = random.normal((len(item.times[0]), *x0.shape[1:]), item.seed, "forward", item.step, item.samples)
    noised, module = forward_states(x0, eps, learner.sigmas, item.times), learner.backbone.load_transformer(x0.dtype)
    for i, (row, node) in enumerate(noised.places):
        prompt = learner.embeddings.rows([item.prompt_ids[row]])
        pipe = Pipeline(learner.backbone, prompt, learner.embeddings.negative(1))
        at = (module, noised.x[i : i + 1], learner.sigmas[node : node + 1])
        with torch.no_grad():
            if family == "flux1":
                want = pipe.embedded(*at, 2.0)
            else:
                want = pipe.guided(pipe.output(*at), pipe.output(*at, negative=True), 2.0)
        assert relative(unpack(rollout.base)[i : i + 1], want) <= 1e-4


def test_the_run_s_own_guidance_is_the_default_bit_for_bit(tmp_path: Path) -> None:
    shared = ["backbone.guidance=3", "steps=2"]
    digests = [
        local_digest(config(tmp_path, *shared, f"learners.base_penalty={{weight: 1, guidance: {guidance}}}"))
        for guidance in ("null", 3, 2)
    ]
    assert digests[0] == digests[1] != digests[2]
