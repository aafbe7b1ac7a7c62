"""Rewards that only score: what they are shown, what comes back, and what is not finite; the exact verifier as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowbp_ray.backbones.base import uint8_images
from flowbp_ray.local import LocalLoop
from flowbp_ray.messages import unpack
from flowbp_ray.rewards import RewardTerm, build, score_and_cotangent, unit_images
from flowbp_ray.rewards.jitter import KeyedJitter
from flowbp_ray.shapes import load_prompts, render, sample_scene, verify
from tests.conftest import Saved
from tests.learning.forward_steps import config_of

ROWS = 5
PROMPTS = ["a", "a red star", "two rings", "a ring and a star", "cross"]


@dataclass
class Seen:
    """Scores the mean of a picture without gradient, and remembers what it was shown."""

    name: str = "seen"
    shown: list[Tensor] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    grad: bool = False

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.shown.append(images)
        self.texts += prompts
        self.grad |= torch.is_grad_enabled() or images.requires_grad
        return torch.tensor([float(i.mean()) + len(p) for i, p in zip(images.detach(), prompts, strict=True)])


@dataclass
class Smooth:
    """A differentiable reward."""

    name: str = "smooth"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.square().mean((1, 2, 3))


@dataclass
class Broken:
    """NaN for the prompt `bad`."""

    bad: str
    name: str = "broken"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([math.nan if p == self.bad else 1.0 for p in prompts])


@pytest.fixture(scope="module")
def target() -> Tensor:
    return torch.randn(ROWS, 1, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def call(target: Tensor, decoder: nn.Module, rewards: list, scored: list, **more: object):  # type: ignore[no-untyped-def]
    settings: dict = {"prompts": PROMPTS, "omega": torch.ones(ROWS), "global_batch": ROWS, **more}
    return score_and_cotangent(target, lambda z: unit_images(decoder(z)), rewards, scored=scored, **settings)


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "beside a differentiable one"])
@pytest.mark.parametrize("micro_batch", [None, 1, 2, 4])
def test_scores_are_those_of_direct_calls_on_plain_pictures(
    target: Tensor, decoder: nn.Module, mixed: bool, micro_batch: int | None
) -> None:
    """The same decoded images as without jitter, though the differentiable reward sees it; no gradient is recorded."""
    seen, jitter = Seen(), KeyedJitter(seed=3, step=7, noise=0.2, shift=1, samples=list(range(ROWS)))
    rewards = [(RewardTerm("smooth"), Smooth())] if mixed else []
    found = call(target, decoder, rewards, [("seen", seen)], micro_batch=micro_batch, jitter=jitter)
    images = unit_images(decoder(target[:, 0])).detach()
    torch.testing.assert_close(torch.cat(seen.shown), images)
    want = Seen().score(images, PROMPTS)
    torch.testing.assert_close(found.scores["seen"], want[:, None])
    assert seen.texts == PROMPTS and not seen.grad and len(seen.shown) == math.ceil(ROWS / (micro_batch or ROWS))
    assert found.bad == () and "seen" not in found.clipped


def test_beside_a_differentiable_reward_nothing_of_it_changes(target: Tensor, decoder: nn.Module) -> None:
    rewards = [(RewardTerm("smooth"), Smooth())]
    with_it, without = (call(target, decoder, rewards, scored) for scored in ([("seen", Seen())], []))
    assert torch.equal(with_it.cotangent, without.cotangent) and torch.equal(with_it.losses, without.losses)
    assert torch.equal(with_it.gram, without.gram) and with_it.cotangent.any()


def test_alone_there_is_no_cotangent(target: Tensor, decoder: nn.Module) -> None:
    found = call(target, decoder, [], [("seen", Seen())])
    assert found.cotangent.shape == (ROWS, 0) and found.gram.shape == (ROWS, 0, 0)
    assert not found.losses.any() and found.clipped == {}


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "beside a differentiable one"])
def test_a_score_that_is_not_finite_is_a_fault(target: Tensor, decoder: nn.Module, mixed: bool) -> None:
    rewards = [(RewardTerm("smooth"), Smooth())] if mixed else []
    found = call(target, decoder, rewards, [("seen", Seen()), ("broken", Broken(PROMPTS[3]))], micro_batch=2)
    assert found.bad == ((3, "score", "broken"),)
    assert math.isnan(found.scores["broken"][3, 0]) and torch.isfinite(found.scores["seen"]).all()
    if mixed:
        assert found.losses[3] == 0 and not found.cotangent[3].any() and found.cotangent[2].any()


def test_a_reward_that_raises_is_named(target: Tensor, decoder: nn.Module) -> None:
    class Raises:
        name = "raises"

        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            raise OSError("no model")

    class Short(Seen):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return super().score(images, prompts)[:-1]

    with pytest.raises(RuntimeError, match="reward 'raises' failed: OSError: no model"):
        call(target, decoder, [], [("raises", Raises())])
    with pytest.raises(ValueError, match="'short' must return one score per image"):
        call(target, decoder, [], [("short", Short())])


def test_the_verifier_scores_what_is_drawn() -> None:
    """Scenes of the prompts and of others: `flowbp_ray.shapes.verify`, picture by picture."""
    prompts, generator = load_prompts("train")[:24], np.random.default_rng(0)
    pictures = [render(sample_scene(generator, prompt.claim)) for prompt in prompts]
    pictures = [*pictures, *pictures[1:], pictures[0]]
    texts = [prompt.text for prompt in prompts] * 2
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    found = build("shapes_verifier").score(images, texts)
    want = [float(verify(picture, prompt)) for picture, prompt in zip(pictures, prompts * 2, strict=True)]
    assert found.dtype == torch.float32 and found.tolist() == want
    assert sum(want[:24]) == 24 and 0 < sum(want[24:]) + 1 < 24


def test_the_verifier_refuses_prompts_of_others() -> None:
    from flowbp_ray.rewards.shapes_verifier import ShapesVerifier

    ShapesVerifier.check_prompts([prompt.text for prompt in load_prompts("dev")])
    with pytest.raises(ValueError, match=r"not 'a cat'; write data.prompts=shapes:train"):
        ShapesVerifier.check_prompts(["a cat"])


def test_the_scores_of_a_run_are_the_verifier_s(saved: Saved, tmp_path: Path) -> None:
    """Jitter is in the configuration and not in the pictures; the part sent back is empty."""
    terms = "rewards.terms=[{name: shapes_verifier, gradient: none}]"
    loop = LocalLoop(config_of("shapes", saved, tmp_path, terms, "rewards.jitter={noise: 0.5, shift: 8}"))
    published, claims = list(loop.learner.publish()), {p.text: p for p in load_prompts("train")}
    [item] = loop.items(0)
    report, _, target = loop.sampler.rollout(item, lambda: published)
    texts = [loop.texts[i] for i in item.prompt_ids]
    scored, cotangent = loop.scorer.score(item, texts, report, target)
    with torch.no_grad():
        pictures = uint8_images(loop.scorer.decode(unpack(target)[:, 0]))
    want = [(float(verify(picture, claims[text])),) for picture, text in zip(pictures, texts, strict=True)]
    assert list(scored.scores["shapes_verifier"]) == want and unpack(cotangent).shape == (6, 0)
    assert scored.cotangent_bytes == 0 and scored.gram == ((),) * 6
