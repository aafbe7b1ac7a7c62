"""The objective against autograd of the whole loss, and its independence of how a batch is cut up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from flowbp_ray.rewards import Objective, RewardTerm, build, score_and_cotangent, unit_images
from flowbp_ray.rewards.jitter import KeyedJitter


@dataclass
class Bumpy:
    """A smooth, non-linear toy reward whose value depends on the image and the length of the prompt."""

    name: str
    rate: float

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        length = torch.tensor([float(len(p)) for p in prompts], dtype=images.dtype)
        return torch.sin(self.rate * images.pow(2).mean((1, 2, 3)) * length) + images[:, 0].mean((1, 2))


ROWS, BRANCHES = 5, 2
TERMS = [
    (RewardTerm("one", weight=0.7, clip=1.2, scale=1.5), Bumpy("one", 0.3)),
    (RewardTerm("two", weight=0.4, clip=0.9), Bumpy("two", 0.9)),
]
PROMPTS = ["a", "a red star", "two rings", "a ring and a star", "cross"]


@pytest.fixture(scope="module")
def target() -> Tensor:
    return torch.randn(ROWS, BRANCHES, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def omega() -> Tensor:
    return torch.tensor([1.0, 0.5, 2.0, 0.25, 3.0])


def run(target: Tensor, decoder: nn.Module, omega: Tensor, **options: object) -> Objective:
    settings: dict = {"global_batch": ROWS, "prompts": PROMPTS, **options}
    return score_and_cotangent(target, lambda z: unit_images(decoder(z)), TERMS, omega=omega, **settings)


def test_equals_autograd_of_the_whole_loss(target: Tensor, decoder: nn.Module, omega: Tensor) -> None:
    z = target.clone().requires_grad_(True)
    images = unit_images(decoder(z.flatten(0, 1)))
    texts = [p for p in PROMPTS for _ in range(BRANCHES)]
    rows = torch.zeros(ROWS * BRANCHES, dtype=torch.float64)
    for term, reward in TERMS:
        rows = rows + term.weight * term.scale * torch.relu(term.clip - reward.score(images, texts))
    loss = (omega.double()[:, None] * rows.view(ROWS, BRANCHES)).mean()
    loss.backward()
    found = run(target, decoder, omega)
    assert found.cotangent.dtype == torch.float32 and found.cotangent.shape == target.shape
    torch.testing.assert_close(found.cotangent, z.grad.float(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.losses.sum() / ROWS, loss.detach().float())
    assert all(score.shape == (ROWS, BRANCHES) for score in found.scores.values())


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 10])
def test_micro_batches_change_nothing(target: Tensor, decoder: nn.Module, omega: Tensor, micro_batch: int) -> None:
    whole, cut = run(target, decoder, omega), run(target, decoder, omega, micro_batch=micro_batch)
    torch.testing.assert_close(cut.cotangent, whole.cotangent, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(cut.losses, whole.losses)
    torch.testing.assert_close(cut.scores, whole.scores)


def test_servers_may_split_the_batch(target: Tensor, decoder: nn.Module, omega: Tensor) -> None:
    jitter = KeyedJitter(seed=3, step=7, noise=0.2, shift=1)
    whole = run(target, decoder, omega, jitter=jitter)
    for rows in (slice(0, 2), slice(2, 5)):
        samples = list(range(ROWS))[rows]
        jitter = KeyedJitter(seed=3, step=7, noise=0.2, shift=1, samples=samples)
        part = run(target[rows], decoder, omega[rows], prompts=PROMPTS[rows], jitter=jitter)
        torch.testing.assert_close(part.cotangent, whole.cotangent[rows], rtol=1e-6, atol=1e-10)
        torch.testing.assert_close(part.losses, whole.losses[rows])


def test_separate_cotangents_sum_to_the_whole(target: Tensor, decoder: nn.Module, omega: Tensor) -> None:
    whole, parts = run(target, decoder, omega), run(target, decoder, omega, separate=True)
    assert parts.cotangent.shape == (len(TERMS), *target.shape)
    torch.testing.assert_close(parts.cotangent.sum(0), whole.cotangent, rtol=1e-5, atol=1e-9)


def test_a_satisfied_reward_gives_no_gradient(target: Tensor, decoder: nn.Module, omega: Tensor) -> None:
    met = [(RewardTerm("one", clip=-5.0), Bumpy("one", 0.3))]
    found = score_and_cotangent(target, decoder, met, PROMPTS, omega, global_batch=ROWS)
    assert found.clipped == {"one": 1.0}
    assert not found.cotangent.any() and not found.losses.any()


def test_jitter_differs_by_step_and_sample_and_is_differentiable() -> None:
    images = torch.rand(2, 3, 8, 8).expand(2, 3, 8, 8).clone().requires_grad_(True)
    where = [(0, 0), (1, 0)]
    first = KeyedJitter(seed=1, step=0)(images, where)
    again = KeyedJitter(seed=1, step=0)(images, where)
    other = KeyedJitter(seed=1, step=1)(images, where)
    assert torch.equal(first, again) and not torch.equal(first, other)
    first.sum().backward()
    assert images.grad is not None and images.grad.sum().item() == pytest.approx(images.numel())


def test_a_failed_score_is_named_and_gives_no_gradient(target: Tensor, decoder: nn.Module, omega: Tensor) -> None:
    """Only its own row: the others are those of a batch without the failure."""

    class Failing(Bumpy):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            good = super().score(images, prompts)
            return good * torch.tensor([float("nan") if p == PROMPTS[1] else 1.0 for p in prompts])

    clean, broken = (
        score_and_cotangent(target, decoder, [(RewardTerm("r"), kind("r", 0.3))], PROMPTS, omega, ROWS)
        for kind in (Bumpy, Failing)
    )
    assert clean.bad == () and set(broken.bad) == {(1, "score", "r")}
    assert not broken.cotangent[1].any() and torch.isfinite(broken.cotangent).all()
    others = [row for row in range(ROWS) if row != 1]
    assert torch.equal(broken.cotangent[others], clean.cotangent[others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["a"]}, "5 rows need 5 prompts"),
        ({"global_batch": 2}, "at least 5, got 2"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"omega": torch.ones(3)}, "omega must be"),
    ],
)
def test_bad_input_says_what_to_write(
    target: Tensor, decoder: nn.Module, omega: Tensor, change: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(target, decoder, **{"omega": omega, **change})


def test_unknown_reward_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'shapes_clip'"):
        build("shape_clip")


class Detached(Bumpy):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().score(images, prompts).detach()


class Broken(Bumpy):
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise KeyError("red")


@pytest.mark.parametrize(
    ("reward", "kind", "message"),
    [
        (Detached, ValueError, "reward 'r' has no gradient"),
        (Broken, RuntimeError, "reward 'r' failed: KeyError: 'red'"),
    ],
)
def test_a_reward_that_cannot_be_trained_on_is_named(
    target: Tensor, decoder: nn.Module, omega: Tensor, reward: type[Bumpy], kind: type[Exception], message: str
) -> None:
    terms = [(RewardTerm("r"), reward("r", 0.7))]
    with pytest.raises(kind, match=message):
        score_and_cotangent(target, decoder, terms, PROMPTS, omega, ROWS)
