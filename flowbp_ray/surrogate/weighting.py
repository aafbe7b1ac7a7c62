"""Similarity weights and masks from the distance between surrogate and cache (LeapAlign, arXiv 2604.15311)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import Cache, groups, state_value, target_value
from .plan import Branch, Plan, Renoised, Segment


def residuals(plans: Sequence[Plan], cache: Cache) -> Tensor:
    """(d_j, d_0) per sample [B, 2]: mean |x̂ − x| at the junction and at the target of the first branch.

    x̂ integrates cached velocities: x̂[j] from the cached x[k], x̂[N] from the cached x[j]. Without a second segment
    d_j is 0. At least fp32; no gradient.
    """
    out = cache.x.new_zeros((len(plans), 2), dtype=cache.compute_dtype)
    for plan, rows in groups(plans, cache.x.device):
        branch = plan.branches[0]
        if len(branch.segments) == 2:
            first = branch.segments[0]
            predicted = integrate(cache, branch, first, rows)
            out[rows, 0] = _distance(predicted, state_value(cache, first.stop, None, rows))
        predicted = integrate(cache, branch, branch.segments[-1], rows)
        out[rows, 1] = _distance(predicted, target_value(cache, branch.target, rows))
    return out


def integrate(cache: Cache, branch: Branch, segment: Segment, rows: Tensor) -> Tensor:
    """x[start] + Σ w[i]·v[i] over all supports, with cached velocities: [len(rows), …]."""
    fresh = branch.target.index if isinstance(branch.target, Renoised) else None
    value = state_value(cache, segment.start, fresh, rows)
    for node, weight in zip(segment.supports, segment.weights, strict=True):
        value = value + weight * cache.velocity(node, fresh, rows)
    return value


def omega(plans: Sequence[Plan], cache: Cache) -> Tensor:
    """ω = 1/(max(d_j, tau) + max(d_0, tau)) per sample [B]; 1 for a plan without a `tau`. Carries no gradient."""
    d = residuals(plans, cache)
    tau = [plan.similarity.tau if plan.similarity is not None else None for plan in plans]
    floor = d.new_tensor([1.0 if t is None else t for t in tau])
    weight = 1.0 / d.maximum(floor[:, None]).sum(dim=1)
    plain = torch.tensor([t is None for t in tau], device=d.device)
    return torch.where(plain, torch.ones_like(weight), weight)


def keep(plans: Sequence[Plan], distances: Tensor) -> Tensor:
    """The mask [B] bool of samples whose distances (d_j, d_0) [B, 2] are within their plan's `max_distance`."""
    bounds = [plan.similarity.max_distance if plan.similarity is not None else None for plan in plans]
    bound = distances.new_tensor([float("inf") if value is None else value for value in bounds])
    return (distances <= bound[:, None]).all(dim=1)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().flatten(1).mean(dim=1)
