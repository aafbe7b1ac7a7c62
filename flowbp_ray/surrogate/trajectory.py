"""The rollout without gradient, whose states and velocities are the cache of a surrogate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Trajectory:
    """sigmas [N+1], states x [N+1, B, …] (x[0] is noise) and velocities v [N, B, …]."""

    sigmas: Tensor
    x: Tensor
    v: Tensor


@torch.no_grad()
def rollout(velocity: Callable[[Tensor, Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Trajectory:
    """x[i+1] = x[i] + h[i]·v(x[i], i), h[i] = sigma[i+1] − sigma[i].

    noise: x[0] [B, …] in the model's dtype, which the states keep; each update is done in fp32 (fp64 for fp64 states).
    velocity: v(x [B, …], node [B] int64, row [B] int64) -> [B, …].
    """
    compute = torch.promote_types(noise.dtype, torch.float32)
    h = (sigmas[1:] - sigmas[:-1]).tolist()
    row = torch.arange(len(noise), device=noise.device)
    x, states, velocities = noise, [noise], []
    for i, step in enumerate(h):
        v = velocity(x, torch.full_like(row, i), row)
        x = (x.to(compute) + step * v.to(compute)).to(noise.dtype)
        states.append(x)
        velocities.append(v)
    return Trajectory(sigmas, torch.stack(states), torch.stack(velocities))
