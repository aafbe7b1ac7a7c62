"""The gradient laboratory on a small network: against autograd through all steps, and a surrogate known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gradient import Problem, connectors, cosine, full, measure, surrogate
from flowbp_ray.backbones.sigmas import static_shift
from flowbp_ray.config.method import build_method
from flowbp_ray.rollout.items import plans_of_step
from flowbp_ray.surrogate.trajectory import rollout

ROWS, STEPS = 3, 6


@pytest.fixture
def problem() -> Problem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    sigmas = static_shift(STEPS)

    def velocity(x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        return net(torch.cat([x, sigmas[node][:, None].to(x)], dim=1))

    def cotangent(target: Tensor, weights: Tensor) -> Tensor:
        """Of the loss mean over rows of w·Σ target³, branches weighing the same."""
        return 3 * target**2 * weights[:, None, None] / (ROWS * target.shape[1])

    cache = rollout(velocity, torch.randn(ROWS, 2), sigmas)
    return Problem(cache, velocity, velocity, list(net.parameters()), cotangent, seed=5)


def autograd(problem: Problem) -> Tensor:
    """The same loss through one graph of all steps."""
    x, row = problem.cache.x[0], torch.arange(ROWS)
    for i, h in enumerate((problem.cache.sigmas[1:] - problem.cache.sigmas[:-1]).tolist()):
        x = x + h * problem.whole(x, torch.full((ROWS,), i), row)
    (x**3).sum(1).mean().backward()
    return problem.gradient()


def test_full_backpropagation_is_autograds(problem: Problem) -> None:
    expected = autograd(problem)
    assert torch.allclose(full(problem), expected, rtol=1e-5, atol=1e-7)


def test_a_design_is_measured_by_its_draws(problem: Problem) -> None:
    """Four draws of one node each: mean, spread and cosines by hand."""
    truth, spec = full(problem), {"name": "flowbp_sparse", "k": 1, "late_bias": 0.0, "draws": "per_sample"}
    sigmas = problem.cache.sigmas
    plans = [plans_of_step(build_method(spec), sigmas, problem.seed, draw, ROWS) for draw in range(4)]
    drawn = torch.stack([surrogate(problem, plan, draw)[0] for draw, plan in enumerate(plans)]).double()
    found, mean = measure(problem, truth, spec, 4), drawn.mean(0)
    variance = drawn.var(0, unbiased=True).sum()
    norm = (mean.square().sum() - variance / 4).sqrt()
    assert found["cosine"] == pytest.approx(float(mean @ truth.double() / (norm * truth.double().norm())), rel=1e-4)
    assert found["spread"] == pytest.approx(float(variance.sqrt() / norm), rel=1e-4)
    assert found["cosine_of_a_draw"] == pytest.approx(sum(cosine(g, truth.double()) for g in drawn) / 4, rel=1e-4)
    assert found["forwards"] == 1.0 and found["norm_ratio"] == pytest.approx(float(norm / truth.norm()), rel=1e-4)


def test_the_last_step_alone_is_full_backpropagation_of_one_step(problem: Problem) -> None:
    """With a grid of one step there is nothing to leave out: each design that reads the sample is exact."""
    last = Problem(
        rollout(problem.whole, problem.cache.x[-2], problem.cache.sigmas[-2:]),
        problem.learned,
        problem.whole,
        problem.parameters,
        problem.cotangent,
        5,
    )
    found = measure(last, full(last), {"name": "flowbp_sparse", "k": 1, "rescale": 0.0}, 2)
    assert found["cosine"] == pytest.approx(1.0, abs=1e-5) and found["norm_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert found["spread"] == pytest.approx(0.0, abs=1e-2)


def test_connectors_with_every_node_end_where_the_trajectory_does(problem: Problem) -> None:
    """A leap of one node is Euler's step; an order of two or more adds nothing there."""
    found = {(p["order"], p["length"]): p["distance"] for p in connectors(problem.cache)}
    for order in (1, 2, 5):
        assert found[order, 1] == pytest.approx(0.0, abs=1e-6)
    x, v, sigmas = problem.cache.x, problem.cache.v, problem.cache.sigmas
    leap = x[0] + (sigmas[STEPS] - sigmas[0]) * v[0]
    assert found[1, STEPS] == pytest.approx(float((leap - x[STEPS]).abs().mean()), rel=1e-5)
