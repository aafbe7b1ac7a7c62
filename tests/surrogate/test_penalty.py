"""sweep with the base penalty equals autograd of endpoint() plus the penalty written out, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowbp_ray.surrogate import METHODS, Cache, Plan, endpoint, gather_states, places, sweep
from flowbp_ray.surrogate.penalty import base_penalty
from flowbp_ray.utils.random import stream
from tests.surrogate.networks import Network, every_method, make_cache, written_plans

STEPS = 8


class Case:
    """A network, its base (another network), plans, a rollout, cotangents and what each row counts."""

    def __init__(self, plans: Sequence[Plan], seed: int) -> None:
        self.plans, rows = plans, len(plans)
        self.network, self.base = Network(rows, STEPS, seed), Network(rows, STEPS, seed + 1)
        self.cache = make_cache(self.network, rows, STEPS, 2, seed)
        generator = torch.Generator().manual_seed(seed)
        self.u = torch.randn(rows, len(plans[0].branches), 3, dtype=torch.float64, generator=generator)
        self.shares = torch.rand(rows, dtype=torch.float64, generator=generator)
        self.shares[seed % rows] = 0.0 if rows > 1 else 0.8  # a masked row

    def penalty(self) -> Tensor:
        """Σ_b share[b] · mean over the distinct active states · mean over elements of (v − v_base)²."""
        total = torch.zeros((), dtype=torch.float64)
        for b, plan in enumerate(self.plans):
            squares = []
            for node, fresh in plan.states:
                x = self.state(self.cache, b, node, fresh)
                at = (x[None], torch.tensor([node]), torch.tensor([b]))
                squares.append((self.network(*at) - self.base(*at).detach()).square().mean())
            total = total + self.shares[b] * torch.stack(squares).mean()
        return total

    @staticmethod
    def state(cache: Cache, b: int, node: int, fresh: int | None) -> Tensor:
        if fresh is None:
            return cache.x[node, b]
        assert cache.y is not None
        return cache.y[fresh, b]

    def by_definition(self) -> Tensor:
        self.network.zero_grad()
        ((endpoint(self.network, self.plans, self.cache) * self.u).sum() + self.penalty()).backward()
        return self.network.gradient()

    def by_sweep(self, with_penalty: bool = True, **options: int | None) -> tuple[Tensor, int, int]:
        """The gradient, how many backwards it took, and how many rows."""
        states, calls = gather_states(self.plans, self.cache), []
        sample, node = torch.tensor(places(self.plans)).unbind(1)
        with torch.no_grad():
            base = self.base(states, node, sample)

        def backward(loss: Tensor, last: bool) -> None:
            calls.append(last)
            loss.backward()

        self.network.zero_grad()
        penalty = base_penalty(self.plans, base, self.shares) if with_penalty else None
        report = sweep(
            self.network,
            self.plans,
            states,
            self.u,
            backward=backward,
            penalty=penalty,
            **options,  # type: ignore[arg-type]
        )
        assert len(calls) == report.forwards and calls[-1] and not any(calls[:-1])
        return self.network.gradient(), len(calls), report.rows - report.padding

    def check(self, **options: int | None) -> None:
        """The gradient, the number of backwards, and that only states of nothing but junctions cost a row."""
        want = self.by_definition()
        got, backwards, rows = self.by_sweep(**options)
        assert float((got - want).norm()) <= 1e-10 * max(1.0, float(want.norm()))
        plain, plain_backwards, plain_rows = self.by_sweep(with_penalty=False, **options)
        assert backwards == plain_backwards
        terms = [{t.state: all(o.is_junction for o in p.terms() if o.state == t.state) for t in p.terms()}
                 for p in self.plans]  # fmt: skip
        assert rows == plain_rows + sum(sum(only.values()) for only in terms)
        assert float((got - plain).norm()) > 1e-6


@settings(max_examples=100, deadline=None)
@given(data=st.data(), branches=st.integers(1, 3), seed=st.integers(0, 10_000))
def test_written_plans(data: st.DataObject, branches: int, seed: int) -> None:
    """Nodes shared by branches, by both segments, by a junction and a plain term: each state counts once."""
    rows = data.draw(st.integers(1, 4))
    plans = [data.draw(written_plans(STEPS, branches)) for _ in range(rows)]
    most = max(sum(not term.is_junction for term in plan.terms()) for plan in plans)
    Case(plans, seed).check(
        micro_batch=data.draw(st.none() | st.integers(1, rows + 1)),
        fuse=data.draw(st.integers(1, 4)),
        terms_per_sample=data.draw(st.none() | st.integers(most, most + 2)),
    )


@pytest.mark.parametrize("fuse", [1, 64])
@pytest.mark.parametrize("name, arguments", [
    ("flowbp_sparse", {"k": 3}), ("flowbp_bridge", {"k": 4}), ("flowbp_lagrange", {"max_j_rev": 4}), ("leapalign", {}),
    ("drtune", {"k": 3}), ("draft_lv", {"n": 2}), ("refl", {"last": 3}),
])  # fmt: skip
def test_named_methods(name: str, arguments: dict[str, int], fuse: int) -> None:
    """Each sample with a plan of its own."""
    method = METHODS[name](**arguments)
    for seed in range(3):
        sigmas = [1 - i / STEPS for i in range(STEPS + 1)]
        plans = [method.plan(sigmas, stream(seed, "plan", 0, b)) for b in range(3)]
        Case(plans, seed).check(micro_batch=2, fuse=fuse, terms_per_sample=method.max_terms(STEPS).terms)


def test_the_design_space() -> None:
    sigmas = [1 - i / STEPS for i in range(STEPS + 1)]
    for i, method in enumerate(every_method()[::5]):
        plans = [method.plan(sigmas, stream(i, "plan", 0, b)) for b in range(2)]
        Case(plans, i).check(fuse=1 + i % 3)


def test_a_junction_s_nested_gradient_is_the_reward_s_alone() -> None:
    """The first segment of a Bridge is asked to move the junction by the reward, never by the penalty there."""
    method = METHODS["flowbp_bridge"](k=3, alpha=1.0)
    plan = method.plan([1 - i / STEPS for i in range(STEPS + 1)], stream(0, "plan", 0))
    assert any(term.is_junction for term in plan.terms())
    case = Case([plan], 3)
    with_both, *_ = case.by_sweep()
    reward, *_ = case.by_sweep(with_penalty=False)
    case.network.zero_grad()
    case.penalty().backward()
    alone = case.network.gradient()
    assert float((with_both - reward - alone).norm()) <= 1e-10 * float(with_both.norm())
