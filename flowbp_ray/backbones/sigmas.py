"""Sigma grids [N+1] from 1 (noise) to 0 (image), fp32, as diffusers' FlowMatchEulerDiscreteScheduler computes them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def static_shift(num_steps: int, shift: float = 3.0) -> Tensor:
    """sigma = shift·t/(1 + (shift−1)·t) for t = 1, 1−1/N, …, 0 (SD3.5: shift 3)."""
    t = _linear(num_steps)
    return _ended(shift * t / (1 + (shift - 1) * t))


def flux1_mu(
    tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """FLUX.1's mu, linear in the number of image tokens."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return tokens * slope + (base_shift - slope * base_tokens)  # this order gives the same bits as the pipeline


def flux2_mu(tokens: int, num_steps: int) -> float:
    """FLUX.2's empirical mu: linear in the number of steps between two lines fitted at 10 and 200 steps."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * num_steps + (at_200 - 200.0 * slope)


def _linear(num_steps: int) -> np.ndarray:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    return np.linspace(1.0, 1.0 / num_steps, num_steps).astype(np.float32)


def _ended(sigmas: np.ndarray) -> Tensor:
    """Append the final 0 [N+1], fp32."""
    return torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
