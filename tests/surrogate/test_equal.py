"""sweep equals endpoint: over hand-written plans and over every combination of a method's axes, in fp64."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowbp_ray.surrogate import Branch, Cache, Plan, endpoint, gather_states, gather_targets, gather_velocities, sweep
from flowbp_ray.utils.random import stream
from tests.surrogate.networks import Network, every_method, make_cache, written_plans

STEPS = 8
EVERY = every_method()


def both_gradients(
    network: Network, plans: Sequence[Plan], cache: Cache, u: Tensor, **options: int | None
) -> tuple[Tensor, Tensor]:
    """The parameter gradient of Σ⟨u, target⟩ by definition and by sweep."""
    network.zero_grad()
    (endpoint(network, plans, cache) * u).sum().backward()
    by_definition = network.gradient()
    network.zero_grad()
    sweep(network, plans, gather_states(plans, cache), u, **options)  # type: ignore[arg-type]
    return by_definition, network.gradient()


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm()) <= 1e-10 * max(1.0, float(expected.norm()))


def cotangents(samples: int, branches: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, branches, 3, dtype=torch.float64, generator=generator)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), branches=st.integers(1, 3), seed=st.integers(0, 10_000), shared=st.booleans())
def test_written_plans(data: st.DataObject, branches: int, seed: int, shared: bool) -> None:
    samples = data.draw(st.integers(1, 4))
    plans = [data.draw(written_plans(STEPS, branches)) for _ in range(1 if shared else samples)]
    plans *= samples if shared else 1
    network = Network(samples, STEPS, seed)
    cache = make_cache(network, samples, STEPS, 2, seed)
    most = max(sum(not term.is_junction for term in plan.terms()) for plan in plans)
    options = {
        "micro_batch": data.draw(st.none() | st.integers(1, samples + 1)),
        "fuse": data.draw(st.integers(1, 4)),
        "terms_per_sample": data.draw(st.none() | st.integers(most, most + 2)),
    }
    by_definition, by_sweep = both_gradients(network, plans, cache, cotangents(samples, branches, seed), **options)
    assert_equal(by_sweep, by_definition)
    assert torch.allclose(endpoint(network, plans, cache), gather_targets(plans, cache), rtol=0, atol=1e-12)


def test_the_design_space_is_covered() -> None:
    kinds = {axis: {getattr(m, axis).kind for m in EVERY} for axis in ("target", "active", "weights", "segments")}
    assert {axis: len(found) for axis, found in kinds.items()} == {
        "target": 4,
        "active": 4,
        "weights": 4,
        "segments": 5,
    }
    assert len(EVERY) > 800


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("part", range(4))
def test_every_combination_of_a_method(part: int, per_sample: bool) -> None:
    samples = 3
    network = Network(samples, STEPS, part)
    cache = make_cache(network, samples, STEPS, 2, part)
    for i, method in enumerate(EVERY[part::4]):
        keys = range(samples) if per_sample else [0] * samples
        plans = [method.plan(cache.sigmas, stream(part, "plan", i, key)) for key in keys]
        budget = method.max_terms(STEPS)
        u = cotangents(samples, method.branches, i)
        options = {"micro_batch": 1 + i % 3, "fuse": 1 + i % 2, "terms_per_sample": budget.terms}
        by_definition, by_sweep = both_gradients(network, plans, cache, u, **options)
        assert float(by_definition.norm()) > 0
        assert_equal(by_sweep, by_definition)
        for plan in plans:
            assert sum(term.is_junction for term in plan.terms()) == budget.junction
            assert len(plan.branches) == method.branches and plan.renoised == method.renoised


def test_every_term_budget_is_reached() -> None:
    """The padding is no larger than needed: some draw uses it up, wherever its axes draw a large enough grid."""
    for method in [m for m in EVERY if m.target.kind in ("sample", "renoised") and m.active.kind != "supports"]:
        sigmas = [1 - i / STEPS for i in range(STEPS + 1)]
        counts = []
        for i in range(40):
            terms = method.plan(sigmas, stream(1, "plan", i)).terms()
            counts.append(sum(not term.is_junction for term in terms))
        assert max(counts) == method.max_terms(STEPS).terms


def test_alpha_zero_drops_exactly_the_nested_term() -> None:
    """gradient(alpha) − gradient(0) = alpha · (first segment's VJPs of VJP_x at the junction), by autograd alone."""
    method = next(m for m in EVERY if m.coupling > 0 and m.active.kind == "late_biased" and m.target.kind == "sample")
    network = Network(1, STEPS, 5)
    cache = make_cache(network, 1, STEPS, 0, 5)
    plan = method.plan(cache.sigmas, stream(5, "plan", 0))
    branch = plan.branches[0]
    first, last = branch.segments
    u = cotangents(1, 1, 5)
    gradients = []
    for alpha in (branch.coupling, 0.0):
        changed = Plan(STEPS, (Branch(branch.target, branch.segments, alpha),))
        network.zero_grad()
        sweep(network, [changed], gather_states([changed], cache), u)
        gradients.append(network.gradient())
    row = torch.zeros(1, dtype=torch.int64)
    x = cache.x[last.start].clone().requires_grad_()
    v = network(x, row + last.start, row)
    [nested] = torch.autograd.grad((last.coefficients[last.start] * u[0] * v).sum(), x)
    network.zero_grad()
    for node, c in first.coefficients.items():
        (branch.coupling * c * nested * network(cache.x[node], row + node, row)).sum().backward()
    assert_equal(gradients[0] - gradients[1], network.gradient())
    assert float(network.gradient().norm()) > 1e-6


def test_calls_padding_and_observer() -> None:
    """Two groups of junctions, then slots; `last` marks the final backward only; the observer sees real rows."""
    method = next(m for m in EVERY if m.coupling > 0 and m.active.kind == "late_biased" and m.target.kind == "sample")
    network = Network(4, STEPS, 6)
    cache = make_cache(network, 4, STEPS, 0, 6)
    plans = [method.plan(cache.sigmas, stream(6, "plan", 0, b)) for b in range(4)]
    states, cached = gather_states(plans, cache), gather_velocities(plans, cache)
    flags: list[bool] = []
    seen: list[int] = []

    def backward(loss: Tensor, last: bool) -> None:
        flags.append(last)
        loss.backward()

    def observe(position: Tensor, v: Tensor) -> None:
        assert not v.requires_grad and torch.allclose(v, cached[position], rtol=0, atol=1e-12)
        seen.extend(position.tolist())

    options = {"micro_batch": 2, "fuse": 2, "terms_per_sample": 5}
    report = sweep(network, plans, states, cotangents(4, 1, 0), backward=backward, observe=observe, **options)
    assert (report.forwards, report.rows) == (2 * (1 + 3), 2 * (2 + 5 * 2))
    assert report.padding == report.rows - sum(len(plan.terms()) for plan in plans)
    assert flags == [False] * 7 + [True]
    assert sorted(seen) == list(range(len(states)))


@given(plan=written_plans(STEPS, 3))
def test_plans_travel(plan: Plan) -> None:
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan and hash(copy) == hash(plan)
    text = plan.describe()
    assert f"{len(plan.terms())} VJPs" in text
    assert all(f"{c:.6f}" in text for b in plan.branches for s in b.segments for c in s.coefficients.values())
