"""Similarity weights and masks against a loop that is written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowbp_ray.surrogate import METHODS, Cache, Similarity, endpoint, gather_states, keep, omega, residuals, sweep
from flowbp_ray.utils.random import stream
from tests.surrogate.networks import Network, make_cache

STEPS = 10


def setting(tau: float | None, max_distance: float | None = None) -> tuple[list, Cache]:
    method = replace(METHODS["leapalign"](), similarity=Similarity(tau, max_distance))
    cache = make_cache(Network(4, STEPS, 1), 4, STEPS, 0, 1)
    return [method.plan(cache.sigmas, stream(1, "plan", 0, b)) for b in range(4)], cache


def by_hand(plans: list, cache: Cache) -> list[list[float]]:
    """LeapAlign's distances: both leaps start from the cache."""
    rows = []
    for b, plan in enumerate(plans):
        k, j = (segment.start for segment in plan.branches[0].segments)
        at_j = cache.x[k, b] + (cache.sigmas[j] - cache.sigmas[k]) * cache.v[k, b]
        at_end = cache.x[j, b] - cache.sigmas[j] * cache.v[j, b]
        rows.append([float((at_j - cache.x[j, b]).abs().mean()), float((at_end - cache.x[-1, b]).abs().mean())])
    return rows


def test_residuals_and_omega() -> None:
    plans, cache = setting(tau=0.05)
    expected = by_hand(plans, cache)
    assert residuals(plans, cache).tolist() == [pytest.approx(row) for row in expected]
    assert len({plan.branches[0].segments for plan in plans}) > 1
    weights = [1 / (max(d_j, 0.05) + max(d_0, 0.05)) for d_j, d_0 in expected]
    assert omega(plans, cache).tolist() == pytest.approx(weights)


def test_without_tau_all_weights_are_one() -> None:
    plans, cache = setting(tau=None, max_distance=0.1)
    assert omega(plans, cache).tolist() == [1.0] * 4
    plain = [METHODS["flowbp_sparse"](3).plan(cache.sigmas, stream(1, "plan", 0))] * 4
    assert omega(plain, cache).tolist() == [1.0] * 4
    assert residuals(plain, cache).abs().max() < 1e-12


def test_mask_drops_what_is_too_far() -> None:
    plans, cache = setting(tau=0.1)
    distances = residuals(plans, cache)
    assert keep(plans, distances).all()
    bound = float(distances.amax(dim=1).sort().values[1:3].mean())
    plans, cache = setting(tau=0.1, max_distance=bound)
    assert keep(plans, distances).tolist() == [max(row) <= bound for row in distances.tolist()]
    assert int(keep(plans, distances).sum()) == 2


def test_bf16_states_are_differenced_in_fp32() -> None:
    """A bf16 model: values in fp32, cotangents in fp32, gradients within bf16 of the fp64 ones."""
    exact = Network(4, STEPS, 1)
    plans, cache = setting(tau=0.1)
    u = torch.ones(4, 1, 3, dtype=torch.float64) / 4
    sweep(exact, plans, gather_states(plans, cache), u)
    rounded = Network(4, STEPS, 1).bfloat16()
    low = Cache(cache.sigmas, cache.x.bfloat16(), cache.v.bfloat16())
    assert endpoint(rounded, plans, low).dtype == residuals(plans, low).dtype == torch.float32
    states = gather_states(plans, low)
    assert states.dtype == torch.bfloat16
    sweep(rounded, plans, states, u.float())
    error = (rounded.gradient() - exact.gradient()).norm() / exact.gradient().norm()
    assert 0 < float(error) < 0.05
