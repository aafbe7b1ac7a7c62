"""The axis `weights`: Euler, Lagrange, uniform, Adams–Bashforth; anchor and rescale (FlowBP, arXiv 2606.11075).

All weights are computed in fp64 from the sigma grid. sigma falls along the path, so h is negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .plan import axis


@axis
class Euler:
    """w[i] = sigma[i+1] − sigma[i] at every node of the segment: the surrogate equals the cached trajectory."""

    kind: Literal["euler"] = "euler"


@axis
class _Anchored:
    """Base of the rules with `anchor` = lambda, which blends the first of two segments with its Euler leap; 1: none."""

    anchor: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.anchor <= 1.0:
            raise ValueError(f"anchor must be in [0, 1] (1 is no blend with the leap), got {self.anchor}")


@dataclass(frozen=True)
class Lagrange(_Anchored):
    """Integrals of the Lagrange basis of the supports over the segment."""

    kind: Literal["lagrange"] = "lagrange"


@dataclass(frozen=True)
class Uniform(_Anchored):
    """(sigma[b] − sigma[a]) / count for every support."""

    kind: Literal["uniform"] = "uniform"


@dataclass(frozen=True)
class AdamsBashforth(_Anchored):
    """The interpolant of Lagrange, but through the nodes that END at the segment's first node."""

    kind: Literal["adams_bashforth"] = "adams_bashforth"


Weights = Euler | Lagrange | Uniform | AdamsBashforth


def euler(grid: Sequence[float], start: int, stop: int) -> list[float]:
    """h[i] = sigma[i+1] − sigma[i] for start <= i < stop."""
    return [grid[i + 1] - grid[i] for i in range(start, stop)]


def uniform(count: int, sigma_a: float, sigma_b: float) -> list[float]:
    """(sigma_b − sigma_a) / count, `count` times."""
    return [(sigma_b - sigma_a) / count] * count


def lagrange(points: Sequence[float], sigma_a: float, sigma_b: float) -> list[float]:
    """∫ from sigma_a to sigma_b of ∏_{q≠p} (s − sigma[q]) / (sigma[p] − sigma[q]) ds, per point p.

    Gauss–Legendre nodes integrate these polynomials of degree n−1 exactly and without expanding their coefficients.
    Points outside [sigma_b, sigma_a] extrapolate: this is the Adams–Bashforth rule. Sums to sigma_b − sigma_a.
    """
    sigma = np.asarray(points, dtype=np.float64)
    if len(np.unique(sigma)) != len(sigma):
        raise ValueError(f"quadrature needs distinct sigmas, got {list(points)}")
    nodes, gauss = np.polynomial.legendre.leggauss(len(sigma) // 2 + 1)
    s = 0.5 * (sigma_a + sigma_b) + 0.5 * (sigma_b - sigma_a) * nodes
    weights = []
    for p, sigma_p in enumerate(sigma):
        others = np.delete(sigma, p)
        basis = np.prod((s[:, None] - others) / (sigma_p - others), axis=1)
        weights.append(float(0.5 * (sigma_b - sigma_a) * np.sum(gauss * basis)))
    return weights


def spread(start: int, stop: int, order: int) -> tuple[int, ...]:
    """Spread `order` nodes evenly over [start, stop); all its nodes if there are not more.

    Offsets from `start` are linspace(0, length − 1, order), halves rounded to even, as published.
    """
    length = stop - start
    if length <= order:
        return tuple(range(start, stop))
    return tuple(start + int(offset) for offset in np.round(np.linspace(0, length - 1, order)))


def backward_nodes(start: int, order: int) -> tuple[int, ...]:
    """The Adams–Bashforth supports start, start−1, … (`order` of them, fewer near node 0)."""
    return tuple(range(start, max(-1, start - order), -1))


def weigh(rule: Weights, grid: Sequence[float], start: int, stop: int, supports: Sequence[int]) -> list[float]:
    """The rule's weights of `supports` over the segment [start, stop) of the sigma grid."""
    if isinstance(rule, Euler):
        return euler(grid, start, stop)
    if isinstance(rule, Uniform):
        return uniform(len(supports), grid[start], grid[stop])
    return lagrange([grid[i] for i in supports], grid[start], grid[stop])


def anchor_weights(
    weights: Sequence[float], gains: Sequence[float | None], anchor: float, leap: float
) -> tuple[list[float], list[float | None]]:
    """Blend with the Euler leap: c[i] ← anchor·c[i], then c[first] += (1 − anchor)·leap; weights blend alike.

    The first support's gain becomes c/w, because the leap is never scaled by a gain.
    """
    if anchor == 1.0:
        return list(weights), list(gains)
    blended = [anchor * weight for weight in weights]
    c_first = blended[0] * (gains[0] or 0.0) + (1.0 - anchor) * leap
    blended[0] += (1.0 - anchor) * leap
    return blended, [c_first / blended[0], *gains[1:]]


def rescale_factor(rescale: float, total: float, active: float) -> float:
    """f = 1 + rescale·(total/active − 1), which compensates for the cached part of the integral."""
    return 1.0 if rescale == 0.0 else 1.0 + rescale * (total / active - 1.0)
