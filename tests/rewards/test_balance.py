"""Balancing against autograd of the whole batch in one graph, and its independence of how the batch is split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowbp_ray.local import LocalLoop
from flowbp_ray.rewards import Objective, score_and_cotangent
from flowbp_ray.rewards.balance import gram, shares, strengths
from flowbp_ray.surrogate import METHODS
from flowbp_ray.surrogate.backward import sweep
from tests.rewards.test_objective import PROMPTS, TERMS, Bumpy, RewardTerm
from tests.small import small_config

ROWS, BRANCHES, SIGMAS = 4, 2, [1.0, 0.75, 0.5, 0.25, 0.0]
NAMES, WEIGHTS = [t.name for t, _ in TERMS], [t.weight for t, _ in TERMS]
FACTORS = [4 / 3, 0.0, 4 / 3, 4 / 3]  # the second row is masked, the mean is over the others
OMEGA = torch.tensor([1.0, 0.5, 2.0, 0.25])


@pytest.fixture(scope="module")
def target() -> Tensor:
    return torch.randn(ROWS, BRANCHES, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def served(target: Tensor, decoder: nn.Module, servers: int, separate: bool) -> list[Objective]:
    """The batch over so many reward servers."""
    size = ROWS // servers
    parts = [slice(i * size, (i + 1) * size) for i in range(servers)]
    return [
        score_and_cotangent(target[p], decoder, TERMS, PROMPTS[p], OMEGA[p], ROWS, separate=separate) for p in parts
    ]


def together(found: Sequence[Objective]) -> np.ndarray:
    return gram([SimpleNamespace(gram=part.gram.tolist()) for part in found], FACTORS)  # type: ignore[misc]


def image_gradients(target: Tensor, decoder: nn.Module) -> list[Tensor]:
    """Per term the gradient of its part of the batch's loss at the images, from one graph over all rows."""
    images = decoder(target.flatten(0, 1)).detach().requires_grad_(True)
    texts = [p for p in PROMPTS[:ROWS] for _ in range(BRANCHES)]
    row = (torch.tensor(FACTORS) * OMEGA).double().repeat_interleave(BRANCHES) / (ROWS * BRANCHES)
    losses = [(row * t.weight * t.scale * torch.relu(t.clip - r.score(images, texts))).sum() for t, r in TERMS]
    return [torch.autograd.grad(loss, images)[0] for loss in losses]


def test_norms_and_cosines_are_those_of_the_batch_s_gradients(target: Tensor, decoder: nn.Module) -> None:
    one, two = (g.flatten() for g in image_gradients(target, decoder))
    found = strengths(NAMES, together(served(target, decoder, 2, separate=False)))
    assert found["reward_grad_norm/one"] == pytest.approx(one.norm().item(), rel=1e-6)
    assert found["reward_grad_norm/two"] == pytest.approx(two.norm().item(), rel=1e-6)
    cosine = torch.cosine_similarity(one, two, dim=0).item()
    assert found["reward_grad_cosine/one,two"] == pytest.approx(cosine, rel=1e-6) and abs(cosine) < 0.999


def test_each_term_gets_its_share_and_the_norms_keep_their_sum(target: Tensor, decoder: nn.Module) -> None:
    norms = [g.norm().item() for g in image_gradients(target, decoder)]
    found = shares(together(served(target, decoder, 1, separate=True)), WEIGHTS)
    balanced = [s * n for s, n in zip(found, norms, strict=True)]
    assert sum(balanced) == pytest.approx(sum(norms), rel=1e-6)
    assert balanced[0] / balanced[1] == pytest.approx(WEIGHTS[0] / WEIGHTS[1], rel=1e-6)


def test_a_unit_does_not_matter_when_balanced(target: Tensor, decoder: nn.Module) -> None:
    """A reward in thousandths, with its clip, pulls as much as before."""
    cotangents = []
    for unit in (1.0, 1000.0):
        terms = [TERMS[0], (RewardTerm("two", weight=0.4, clip=0.9 * unit), Scaled("two", 0.9, unit))]
        found = score_and_cotangent(target, decoder, terms, PROMPTS[:ROWS], OMEGA, ROWS, separate=True)
        s = torch.tensor(shares(together([found]), WEIGHTS))
        cotangent = torch.tensordot(s, found.cotangent, dims=1)
        cotangents.append(cotangent / cotangent.norm())
    torch.testing.assert_close(cotangents[0], cotangents[1], rtol=1e-4, atol=1e-6)


class Scaled(Bumpy):
    """The same reward in another unit."""

    def __init__(self, name: str, rate: float, unit: float) -> None:
        super().__init__(name, rate)
        self.unit = unit

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.unit * super().score(images, prompts)


def test_a_satisfied_term_leaves_its_share_to_the_others() -> None:
    assert shares(np.diag([4.0, 0.0]), [1.0, 3.0]) == (1.0, 0.0)
    assert shares(np.zeros((2, 2)), [1.0, 1.0]) == (0.0, 0.0)
    assert np.isnan(strengths(["a", "b"], np.diag([1.0, 0.0]))["reward_grad_cosine/a,b"])


@pytest.mark.parametrize("balanced", [False, True])
def test_one_two_or_four_servers_give_one_parameter_gradient(
    target: Tensor, decoder: nn.Module, balanced: bool
) -> None:
    """Through the learner's sweep, into the parameters of a small velocity network."""
    torch.manual_seed(2)
    network = nn.Conv2d(4, 4, 3, padding=1).double()
    plan = METHODS["draft_lv"](n=BRANCHES - 1).plan(SIGMAS, np.random.default_rng(0))
    states = torch.randn(ROWS * len(plan.states), 4, 6, 6, dtype=torch.float64)
    gradients = []
    for servers in (1, 2, 4):
        found = served(target, decoder, servers, separate=balanced)
        cotangent = torch.cat([part.cotangent for part in found], dim=1 if balanced else 0)
        if balanced:
            cotangent = torch.tensordot(
                torch.tensor(shares(together(found), WEIGHTS), dtype=cotangent.dtype), cotangent, dims=1
            )
        cotangent = cotangent.double() * torch.tensor(FACTORS).view(-1, 1, 1, 1, 1)
        network.zero_grad()
        sweep(lambda x, *_: network(x), [plan] * ROWS, states, cotangent)
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert gradients[0].abs().max() > 0
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["none", "grad_norm"])
def test_the_real_parts_give_one_gradient_however_the_batch_is_split(tmp_path: Path, balance: str) -> None:
    """Sampler, decoder, two rewards, selection and learner; a batch of four scored in 1, 2 or 4 parts."""
    terms = "rewards.terms=[{name: shapes_clip}, {name: shapes_clip_heldout, weight: 0.5, scale: 3}]"
    found = []
    for rows in (4, 2, 1):
        split = [terms, f"rewards.balance={balance}", f"data.rollout_batch={rows}", "learners.micro_batch=4"]
        loop = LocalLoop(small_config(tmp_path, "flowbp_sparse", *split))
        assert len(loop.items(0)) == 4 // rows
        loop.step(0)
        moments = loop.learner.engine.optimizer.state.values()  # (1 - beta1) times the gradient, after one step
        found.append(torch.cat([state["exp_avg"].flatten() for state in moments]))
    assert found[0].norm() > 0
    for other in found[1:]:
        assert (other - found[0]).norm() <= 1e-5 * found[0].norm()
