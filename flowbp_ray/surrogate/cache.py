"""The cached rollout, and functions that read a plan's values from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import Plan, PosteriorMean, Sample, Target


@dataclass(frozen=True, eq=False)
class Cache:
    """A rollout: sigmas [N+1], x [N+1, B, …], v [N, B, …]; for DRaFT-LV also the fresh y and v_y, both [n, B, …].

    A rollout that stopped early has x [stop+1, B, …] and v [stop, B, …], which is all that its plans need.
    """

    sigmas: Tensor
    x: Tensor
    v: Tensor
    y: Tensor | None = None
    v_y: Tensor | None = None

    @property
    def num_steps(self) -> int:
        """N, the number of steps."""
        return len(self.sigmas) - 1

    @property
    def compute_dtype(self) -> torch.dtype:
        """fp32, or fp64 for fp64 states."""
        return torch.promote_types(self.x.dtype, torch.float32)

    def velocity(self, node: int, fresh: int | None, rows: Tensor) -> Tensor:
        """Cached v at x[node], or at y[fresh]: [len(rows), …] in the compute dtype."""
        source = self.v[node] if fresh is None else _needed(self.v_y, "v_y")[fresh]
        return source[rows].to(self.compute_dtype)


def state_value(cache: Cache, node: int, fresh: int | None, rows: Tensor) -> Tensor:
    """Cached x[node], or y[fresh]: [len(rows), …] in the compute dtype."""
    source = cache.x[node] if fresh is None else _needed(cache.y, "y")[fresh]
    return source[rows].to(cache.compute_dtype)


def target_value(cache: Cache, target: Target, rows: Tensor) -> Tensor:
    """The reward's input: x[N], x[i] − sigma[i]·v[i], or y − s·v(y, N−1) with s = sigma[N−1]: [len(rows), …]."""
    if isinstance(target, Sample):
        return state_value(cache, cache.num_steps, None, rows)
    node, fresh = (target.node, None) if isinstance(target, PosteriorMean) else (cache.num_steps - 1, target.index)
    return state_value(cache, node, fresh, rows) - float(cache.sigmas[node]) * cache.velocity(node, fresh, rows)


def append_dims(x: Tensor, ndim: int) -> Tensor:
    """Append axes of length 1 until x has `ndim` axes, to broadcast over the axes of a latent."""
    return x.view(*x.shape, *(1,) * (ndim - x.dim()))


def renoise(cache: Cache, eps: Tensor) -> Tensor:
    """y = (1 − s)·x[N] + s·ε with s = sigma[N−1], for ε [n, B, …] (DRaFT-LV): [n, B, …] in the states' dtype."""
    s = float(cache.sigmas[-2])
    x = cache.x[-1].to(cache.compute_dtype)
    return ((1.0 - s) * x + s * eps.to(cache.compute_dtype)).to(cache.x.dtype)


def gather_targets(plans: Sequence[Plan], cache: Cache) -> Tensor:
    """Read the values of all targets from the cache: [B, branches, …], at least fp32."""
    branches = len(plans[0].branches)
    out = cache.x.new_empty((len(plans), branches, *cache.x.shape[2:]), dtype=cache.compute_dtype)
    for plan, rows in groups(plans, cache.x.device):
        for b, branch in enumerate(plan.branches):
            out[rows, b] = target_value(cache, branch.target, rows)
    return out


def places(plans: Sequence[Plan]) -> list[tuple[int, int]]:
    """(sample, node) of each state that `gather_states` returns, in the same order."""
    return [(b, node) for b, plan in enumerate(plans) for node, _ in plan.states]


def gather_states(plans: Sequence[Plan], cache: Cache) -> Tensor:
    """Gather the states that the learner needs [R, …], sample-major: for each sample its `plan.states` in order."""
    return _gather(plans, cache.x, cache.y, "y")


def gather_velocities(plans: Sequence[Plan], cache: Cache) -> Tensor:
    """Gather the cached velocities [R, …] at the states of `gather_states`, in the same order."""
    return _gather(plans, cache.v, cache.v_y, "v_y")


def _gather(plans: Sequence[Plan], cached: Tensor, fresh: Tensor | None, name: str) -> Tensor:
    rows = [
        cached[node][b] if index is None else _needed(fresh, name)[index][b]
        for b, plan in enumerate(plans)
        for node, index in plan.states
    ]
    return torch.stack(rows) if rows else cached.new_empty((0, *cached.shape[2:]))


def groups(plans: Sequence[Plan], device: torch.device) -> Iterator[tuple[Plan, Tensor]]:
    """Group samples with equal plans; yields (plan, rows [r] int64)."""
    if len({len(plan.branches) for plan in plans}) > 1:
        raise ValueError("all plans of a batch must have the same number of branches")
    members: dict[Plan, list[int]] = {}
    for b, plan in enumerate(plans):
        members.setdefault(plan, []).append(b)
    for plan, rows in members.items():
        yield plan, torch.tensor(rows, device=device)


def _needed(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"the plan has renoised targets: give the cache its {name} [n, B, …] (see renoise)")
    return value
