"""Gradients of the authors' published code: 33 cases on real diffusers transformers, through both backward paths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowbp_ray.backbones.sigmas import flux1_mu, flux2_mu, static_shift
from flowbp_ray.surrogate import endpoint, gather_states, gather_targets, omega, residuals, sweep
from tests.surrogate.golden import CASES, Golden
from tests.surrogate.networks import dynamic_grid

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def gradient_error(golden: Golden) -> float:
    """Relative error of all parameters' gradient together; parameters without a recorded one must have none."""
    difference = reference = 0.0
    for name, parameter in golden.model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected = golden.tensors.get(f"grad.{name}", torch.zeros_like(parameter))
        difference += float((grad.double() - expected).pow(2).sum())
        reference += float(expected.double().pow(2).sum())
    assert reference > 0
    return (difference / reference) ** 0.5


def test_there_are_33_cases() -> None:
    assert len(CASES) == 33


def test_rollout_and_schedule(golden: Golden) -> None:
    steps, sigmas = golden.case["num_steps"], golden.tensors["sigmas"]
    grid = {
        "sd35": lambda: static_shift(steps, 3.0),
        "flux1": lambda: dynamic_grid(steps, flux1_mu(16)),
        "flux2": lambda: dynamic_grid(steps, flux2_mu(16, steps)),
    }[golden.case["backbone"]]()
    assert torch.allclose(grid, sigmas, rtol=0, atol=3e-7)
    assert relative(golden.rollout(), golden.tensors["latents"]) < TOLERANCE


def test_weights_and_targets(golden: Golden) -> None:
    plan = golden.method.build(golden.tensors["sigmas"], golden.draw)
    plans = [plan, plan]
    value = gather_targets(plans, golden.cache).transpose(0, 1).flatten(0, 1)
    assert relative(value, golden.tensors["target"]) < TOLERANCE
    weights = omega(plans, golden.cache).repeat(len(plan.branches))
    assert relative(weights, golden.tensors["sample_weights"]) < TOLERANCE
    rewards, _ = golden.loss(gather_targets(plans, golden.cache))
    assert relative(rewards, golden.tensors["rewards"]) < TOLERANCE


def test_recorded_factors_and_residuals(golden: Golden) -> None:
    plan = golden.method.build(golden.tensors["sigmas"], golden.draw)
    factor = golden.case["drawn"].get("grad_rescale_factor")
    gains = {gain for segment in plan.branches[0].segments for gain in segment.gains if gain is not None}
    if factor is not None:
        assert list(gains) == [pytest.approx(factor, rel=1e-5)]
    if "support_kj" in golden.case["drawn"]:
        supports = [list(segment.supports) for segment in plan.branches[0].segments]
        assert supports == [golden.case["drawn"]["support_kj"], golden.case["drawn"]["support_j0"]]
    if golden.case["method"] == "flowbp_lagrange":
        distances = residuals([plan, plan], golden.cache).mean(0).tolist()
        recorded = golden.case["residuals"]
        assert distances == pytest.approx([recorded["dj"], recorded["d0"]], rel=1e-4, abs=1e-6)
    assert all(gain > 0 for gain in gains)


def test_sweep(golden: Golden) -> None:
    plan = golden.method.build(golden.tensors["sigmas"], golden.draw)
    plans = [plan, plan]
    value = gather_targets(plans, golden.cache).requires_grad_()
    weights = omega(plans, golden.cache).repeat(len(plan.branches))
    loss = (weights * golden.loss(value)[1]).mean()
    loss.backward()
    assert value.grad is not None
    golden.model.zero_grad()
    sweep(golden.learner_velocity, plans, gather_states(plans, golden.cache), value.grad)
    assert float(loss.detach()) == pytest.approx(golden.case["loss"], rel=TOLERANCE)
    assert gradient_error(golden) < TOLERANCE


def test_endpoint(golden: Golden) -> None:
    plan = golden.method.build(golden.tensors["sigmas"], golden.draw)
    plans = [plan, plan]
    golden.model.zero_grad()
    weights = omega(plans, golden.cache).repeat(len(plan.branches))
    loss = (weights * golden.loss(endpoint(golden.velocity, plans, golden.cache))[1]).mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(golden.case["loss"], rel=TOLERANCE)
    assert gradient_error(golden) < TOLERANCE
