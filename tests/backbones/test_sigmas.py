"""Grids and rollout against diffusers' own scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from flowbp_ray.backbones.sigmas import flux1_mu, flux2_mu, static_shift
from flowbp_ray.surrogate.trajectory import rollout

STEPS = [1, 2, 8, 25, 40, 50]


def linear(steps: int) -> np.ndarray:
    return np.linspace(1.0, 1.0 / steps, steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 4.5])
def test_static_shift(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=linear(steps))
    grid = static_shift(steps, shift)
    assert grid.dtype == torch.float32 and grid[0] == 1 and grid[-1] == 0
    assert torch.equal(grid, scheduler.sigmas)


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 4300, 4301, 16384])
def test_mu(tokens: int) -> None:
    assert flux1_mu(tokens) == pytest.approx(calculate_shift(tokens, max_shift=1.15), rel=1e-12)
    for steps in STEPS:
        assert flux2_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


def test_rollout_takes_the_scheduler_s_steps() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=linear(6))
    noise = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    trajectory = rollout(lambda x, node, row: torch.sin(x) + node[:, None] + row[:, None], noise, static_shift(6))
    x = noise
    for i, t in enumerate(scheduler.timesteps):
        v = torch.sin(x) + i + torch.arange(2)[:, None]
        x = scheduler.step(v, t, x, return_dict=False)[0]
        assert torch.allclose(trajectory.v[i], v, rtol=1e-6, atol=1e-6)
        assert torch.allclose(trajectory.x[i + 1], x, rtol=1e-6, atol=1e-6)


def test_rollout_keeps_the_dtype_and_updates_in_fp32() -> None:
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    trajectory = rollout(lambda x, node, row: torch.tanh(x * 3), noise, static_shift(4))
    assert trajectory.x.dtype == trajectory.v.dtype == torch.bfloat16
    h = float(trajectory.sigmas[1] - trajectory.sigmas[0])
    expected = (noise.float() + h * torch.tanh(noise * 3).float()).bfloat16()
    assert torch.equal(trajectory.x[1], expected)
    assert not trajectory.x.requires_grad


def test_a_grid_needs_steps() -> None:
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        static_shift(0)
