"""The rollout without gradient. Its states and velocities are the cache of a surrogate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cache import Cache

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""v(x [R, …], node [R] int64, row [R] int64) -> [R, …]; `row` is the sample of the batch that a state belongs to."""


@torch.no_grad()
def rollout(velocity: Velocity, noise: Tensor, sigmas: Tensor, stop: int | None = None) -> Cache:
    """Roll out with Euler steps: x[i+1] = x[i] + h[i]·v(x[i], i), h[i] = sigma[i+1] − sigma[i].

    noise: x[0] [B, …] in the model's dtype, which the states keep; each update is done in fp32 (fp64 for fp64 states).
    velocity: v(x [B, …], node [B] int64, row [B] int64) -> [B, …]. stop: the number of steps to take (see `Plan.stop`);
    None: all N. The cache then has x [stop+1, B, …] and v [stop, B, …].
    """
    compute = torch.promote_types(noise.dtype, torch.float32)
    h = (sigmas[1:] - sigmas[:-1]).tolist()[:stop]
    row = torch.arange(len(noise), device=noise.device)
    x, states, velocities = noise, [noise], []
    for i, step in enumerate(h):
        v = velocity(x, torch.full_like(row, i), row)
        x = (x.to(compute) + step * v.to(compute)).to(noise.dtype)
        states.append(x)
        velocities.append(v)
    return Cache(sigmas, torch.stack(states), torch.stack(velocities))
