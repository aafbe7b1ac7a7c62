"""Integration weights against closed forms that are derived independently."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbp_ray.backbones.sigmas import static_shift
from flowbp_ray.surrogate.quadrature import anchor_weights, backward_nodes, lagrange, rescale_factor, spread
from flowbp_ray.utils.random import stream
from tests.surrogate.networks import dynamic_grid, every_method

grids = st.lists(st.floats(0.02, 1.0), min_size=1, max_size=12).map(
    lambda steps: [float(s) for s in np.cumsum([0.0, *steps])[::-1] / sum(steps)]
)


@settings(max_examples=200, deadline=None)
@given(grid=grids, order=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_lagrange_is_exact_on_polynomials(grid: list[float], order: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = len(grid) - 1
    a = int(rng.integers(0, n))
    b = int(rng.integers(a + 1, n + 1))
    supports = spread(a, b, order)
    weights = lagrange([grid[i] for i in supports], grid[a], grid[b])
    assert sum(weights) == pytest.approx(grid[b] - grid[a], rel=1e-8, abs=1e-12)
    polynomial = np.polynomial.Polynomial(rng.normal(size=len(supports)))
    exact = polynomial.integ()(grid[b]) - polynomial.integ()(grid[a])
    assert sum(w * polynomial(grid[i]) for w, i in zip(weights, supports, strict=True)) == pytest.approx(
        exact, rel=1e-7, abs=1e-10 * sum(abs(w) for w in weights) + 1e-12
    )


@settings(max_examples=100, deadline=None)
@given(grid=grids, order=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_adams_bashforth_solves_the_moment_equations(grid: list[float], order: int, seed: int) -> None:
    """Σ w[p]·sigma[p]^m = (b^{m+1} − a^{m+1})/(m+1) for m < order: a Vandermonde system, solved in 50 digits."""
    from decimal import Decimal, getcontext

    getcontext().prec = 50
    rng = np.random.default_rng(seed)
    n = len(grid) - 1
    a = int(rng.integers(0, n))
    b = int(rng.integers(a + 1, n + 1))
    supports = backward_nodes(a, order)
    assert supports == tuple(i for i in range(a, a - order, -1) if i >= 0)
    s, low, high = [Decimal(grid[i]) for i in supports], Decimal(grid[a]), Decimal(grid[b])
    rows = [[x**m for x in s] + [(high ** (m + 1) - low ** (m + 1)) / (m + 1)] for m in range(len(s))]
    for i in range(len(s)):
        pivot = max(range(i, len(s)), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for r in range(len(s)):
            if r != i:
                rows[r] = [x - rows[r][i] * y for x, y in zip(rows[r], rows[i], strict=True)]
    expected = [float(row[-1]) for row in rows]
    assert lagrange([grid[i] for i in supports], grid[a], grid[b]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("order", "textbook"), [(1, [1]), (2, [3 / 2, -1 / 2]), (3, [23 / 12, -16 / 12, 5 / 12]), (4, [55, -59, 37, -9])]
)
def test_adams_bashforth_on_an_even_grid(order: int, textbook: list[float]) -> None:
    grid = [1 - i / 8 for i in range(9)]
    scale = 24 if order == 4 else 1
    weights = lagrange([grid[i] for i in backward_nodes(5, order)], grid[5], grid[6])
    assert weights == pytest.approx([-w / 8 / scale for w in textbook], rel=1e-12)


def test_spread_rounds_offsets_to_even() -> None:
    assert spread(1, 12, 5) == (1, 3, 6, 9, 11)
    assert spread(6, 12, 4) == (6, 8, 9, 11)
    assert spread(6, 12, 3) == (6, 8, 11)
    assert spread(4, 6, 3) == (4, 5)
    assert spread(3, 9, 1) == (3,)


def test_anchor_blends_values_and_gradients() -> None:
    weights, gains = anchor_weights([-0.2, -0.4, -0.1], [1.5, 0.5, None], 0.4, leap=-0.7)
    assert weights == pytest.approx([-0.2 * 0.4 - 0.6 * 0.7, -0.16, -0.04])
    assert sum(weights) == pytest.approx(-0.7)
    assert gains[0] is not None
    assert weights[0] * gains[0] == pytest.approx(0.4 * -0.2 * 1.5 + 0.6 * -0.7)
    assert gains[1:] == [0.5, None]


def test_rescale_factor() -> None:
    assert rescale_factor(0.0, 3.0, 1.0) == 1.0
    assert rescale_factor(0.5, 3.0, 1.0) == 2.0
    assert rescale_factor(1.0, 3.0, 1.5) == 2.0


@pytest.mark.parametrize("sigmas", [static_shift(8), dynamic_grid(8, 1.9)], ids=["static", "dynamic"])
def test_weights_of_every_method_sum_to_the_interval(sigmas: object) -> None:
    """First segment sigma[j] − sigma[start]; last segment, whatever the target, 0 − sigma[start]."""
    sigma = [float(s) for s in sigmas]  # type: ignore[attr-defined]
    for i, method in enumerate(every_method()):
        plan = method.plan(sigma, stream(3, "plan", i))
        for branch in plan.branches:
            starts = [segment.start for segment in branch.segments]
            ends = [b for _, b in pairwise([*(sigma[start] for start in starts), 0.0])]
            for segment, end in zip(branch.segments, ends, strict=True):
                assert sum(segment.weights) == pytest.approx(end - sigma[segment.start], abs=1e-11)


def test_rescale_restores_the_total_of_a_method() -> None:
    """With rescale 1 the active |c| of Euler weights sum to Σ|h| of the trainable window."""
    for method in every_method():
        if method.rescale == 0.5 and method.weights.kind == "euler" and method.active.kind == "late_biased":
            sigma = [1 - i / 8 for i in range(9)]
            plan = method.plan(sigma, stream(4, "plan", 0))
            segments = plan.branches[0].segments
            total = sum(abs(w) for s in segments for w in s.weights)
            active = sum(abs(s.weights[i]) for s in segments for i, g in enumerate(s.gains) if g is not None)
            c = sum(abs(c) for s in segments for c in s.coefficients.values())
            assert c == pytest.approx(0.5 * (total + active))
