"""A method is a value: a point of the design space target × active set × weights × coupling (FlowBP, arXiv 2606.11075).

Every axis value is a small frozen dataclass with a `kind`, so a method is written alike in Python and in YAML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from .active import Inactive, LastNodes, LateBiased, Strided, Supports, pick_one, pick_two
from .plan import Branch, Plan, PosteriorMean, Renoised, Sample, Segment, Similarity, Target, axis
from .quadrature import (
    AdamsBashforth,
    Euler,
    Lagrange,
    Uniform,
    anchor_weights,
    backward_nodes,
    rescale_factor,
    spread,
    weigh,
)
from .segments import OneSegment, Segments
from .targets import EarlyStop, LatePosterior, WithRenoised


@dataclass(frozen=True)
class Draw:
    """The nodes that a method drew: `end` of a posterior mean, the pair (k, j), and the active nodes."""

    end: int | None = None
    k: int | None = None
    j: int | None = None
    nodes: tuple[int, ...] = ()


class TermBudget(NamedTuple):
    """The most VJPs that a sample can need besides the junction's, and whether there is a junction."""

    terms: int
    junction: bool


@axis
class Method:
    """A training method: the four axes and their modifiers. `plan` depends on the sigma grid and the generator only."""

    target: Sample | LatePosterior | EarlyStop | WithRenoised = field(default=Sample())
    active: LateBiased | Strided | LastNodes | Inactive | Supports = field(default=LateBiased())
    weights: Euler | Lagrange | Uniform | AdamsBashforth = field(default=Euler())
    segments: Segments = field(default=OneSegment())
    coupling: float = 0.0
    rescale: float = 0.0
    tail_ratio: float = 1.0
    similarity: Similarity | None = None
    draws: Literal["per_batch", "per_sample"] = "per_batch"

    def __post_init__(self) -> None:
        one, supports = isinstance(self.segments, OneSegment), isinstance(self.active, Supports)
        if not 0 <= self.coupling <= 1:
            raise ValueError(f"coupling must be in [0, 1], got {self.coupling}")
        if one and self.coupling > 0:
            raise ValueError(
                f"coupling needs two segments: write a (k, j) draw in segments, or coupling: 0, got {self.coupling}"
            )
        if not 0 < self.tail_ratio <= 1:
            raise ValueError(f"tail_ratio must be in (0, 1], got {self.tail_ratio}")
        if self.draws not in ("per_batch", "per_sample"):
            raise ValueError(f"draws must be per_batch or per_sample, got {self.draws}")
        if isinstance(self.weights, AdamsBashforth) and not supports:
            raise ValueError(
                "weights adams_bashforth needs active: {kind: supports}; write weights: lagrange otherwise"
            )
        if not isinstance(self.weights, Euler) and self.weights.anchor < 1 and (one or not supports):
            raise ValueError("anchor below 1 needs two segments and active: {kind: supports}; write anchor: 1")
        if not one and not isinstance(self.active, Supports) and self.active.k < 2:
            raise ValueError(f"active steps k must be at least 2 with two segments, got {self.active.k}")

    @property
    def branches(self) -> int:
        """The number of targets per sample: n + 1 with n renoised ones, else 1."""
        return 1 + self.renoised

    @property
    def renoised(self) -> int:
        """The number of fresh states y per sample."""
        return self.target.n if isinstance(self.target, WithRenoised) else 0

    def window(self, n: int) -> int:
        """W = min(n, max(3, ceil(tail_ratio·n))) trainable nodes of n, at the end; 1 instead of 3 for one segment."""
        least = 1 if isinstance(self.segments, OneSegment) else 3
        return min(n, max(least, int(np.ceil(self.tail_ratio * n - 1e-9))))

    def check(self, num_steps: int) -> None:
        """Raises ValueError if some draw on `num_steps` steps would be impossible, so that it fails before a run."""
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        shortest = self._shortest(num_steps)
        window = self.window(shortest)
        most = self.window(num_steps)
        if not isinstance(self.active, Supports) and self.active.k > most:
            raise ValueError(f"active steps k must be in [1, {most}], got {self.active.k}")
        if not isinstance(self.segments, OneSegment) and window < self.segments.least:
            raise ValueError(
                f"segments {self.segments.kind} needs {self.segments.least} trainable nodes, got {window}: "
                "raise num_steps, or let the target end later"
            )
        several = isinstance(self.active, Supports) and self.active.count > 1
        if isinstance(self.weights, AdamsBashforth) and several and self.window(num_steps) < num_steps:
            raise ValueError(
                "adams_bashforth with more than one active support reaches before the trainable window: "
                "write tail_ratio: 1 or mode: start"
            )

    def draw(self, num_steps: int, rng: np.random.Generator) -> Draw:
        """Draw the nodes. All randomness of a method is here."""
        self.check(num_steps)
        end = None
        if isinstance(self.target, LatePosterior):
            end = num_steps - int(rng.integers(1, self.target.last + 1))
        elif isinstance(self.target, EarlyStop):
            end = num_steps - int(rng.integers(1, round(self.target.ratio * num_steps) + 1))
        n = num_steps if end is None else end + 1
        window = self.window(n)
        if isinstance(self.segments, OneSegment):
            if isinstance(self.active, Supports):
                return Draw(end)
            return Draw(end, nodes=pick_one(self.active, n, window, rng))
        k, j = self.segments.draw(n, window, rng)
        if isinstance(self.active, Supports):
            return Draw(end, k, j)
        start = k if self.segments.start == "k" else n - window
        return Draw(end, k, j, pick_two(self.active, start, j, n, rng))

    def build(self, sigmas: Tensor | Sequence[float], draw: Draw) -> Plan:
        """Build the plan of drawn nodes on a sigma grid [N+1], deterministically and in fp64."""
        sigma = [float(s) for s in sigmas]
        num_steps = len(sigma) - 1
        self.check(num_steps)
        target, grid = self._target(sigma, draw)
        n = len(grid) - 1
        trainable = n - self.window(n)
        ranges = self._ranges(draw, trainable, n)
        rows = [self._segment(grid, a, b, draw, i == 0 and len(ranges) == 2) for i, (a, b) in enumerate(ranges)]
        if not isinstance(self.active, Supports):
            rows = _rescaled_together(rows, self.rescale)
        segments = tuple(Segment(a, b, *row) for (a, b), row in zip(ranges, rows, strict=True))
        chosen = {*draw.nodes, *(node for segment in segments for node in segment.coefficients)}
        if chosen and (min(chosen) < trainable or max(chosen) >= n):
            raise ValueError(f"active nodes must be in [{trainable}, {n}), got {sorted(chosen)}")
        branches = [Branch(target, segments, self.coupling)]
        last = Segment(num_steps - 1, num_steps, (num_steps - 1,), (-sigma[num_steps - 1],), (1.0,))
        branches += [Branch(Renoised(m), (last,)) for m in range(self.renoised)]
        return Plan(num_steps, tuple(branches), self.similarity)

    def plan(self, sigmas: Tensor | Sequence[float], rng: np.random.Generator) -> Plan:
        """Draw the nodes and build their plan."""
        return self.build(sigmas, self.draw(len(sigmas) - 1, rng))

    def max_terms(self, num_steps: int) -> TermBudget:
        """The largest number of VJPs of any draw, known in advance so that all ranks can pad to it."""
        self.check(num_steps)
        window = self.window(num_steps)
        parts = 1 if isinstance(self.segments, OneSegment) else 2
        most = min(parts * self.active.count, window) if isinstance(self.active, Supports) else self.active.k
        junction = self.coupling > 0
        return TermBudget(most - junction + self.renoised, junction)

    def mean_stop(self, num_steps: int, rows: int = 1) -> float:
        """The steps that a rollout of `rows` rows takes on average until it has what the rows' plans need.

        The row that needs most decides. Each draws its stop uniformly from a…N, so the mean of the largest of n draws
        is N − Σ (k/m)^n over k = 1…m−1, with m = N − a + 1; n is 1 where the whole batch has one draw.
        """
        m, n = num_steps - self._shortest(num_steps) + 1, rows if self.draws == "per_sample" else 1
        return num_steps - sum((k / m) ** n for k in range(1, m))

    def _shortest(self, num_steps: int) -> int:
        """The number of nodes of the shortest grid that the target can draw."""
        if isinstance(self.target, LatePosterior):
            if self.target.last > num_steps:
                raise ValueError(f"last must be in [1, {num_steps}], got {self.target.last}")
            return num_steps - self.target.last + 1
        if isinstance(self.target, EarlyStop):
            most = round(self.target.ratio * num_steps)
            if most < 1:
                raise ValueError(
                    f"ratio must be above {0.5 / num_steps:g} with {num_steps} steps, got {self.target.ratio}"
                )
            return num_steps - most + 1
        return num_steps

    def _target(self, sigma: list[float], draw: Draw) -> tuple[Target, list[float]]:
        """The target and its grid. A posterior mean at e is the sample of the grid cut after e: sigma[0…e], 0."""
        num_steps = len(sigma) - 1
        if isinstance(self.target, Sample):
            return self.target, sigma
        end = num_steps - 1 if isinstance(self.target, WithRenoised) else draw.end
        if end is None or not 0 <= end < num_steps:
            raise ValueError(f"the drawn end must be in [0, {num_steps - 1}], got {end}")
        return PosteriorMean(end), [*sigma[: end + 1], 0.0]

    def _ranges(self, draw: Draw, trainable: int, n: int) -> list[tuple[int, int]]:
        if isinstance(self.segments, OneSegment):
            return [(trainable, n)]
        start = draw.k if self.segments.start == "k" else trainable
        if start is None or draw.j is None or not trainable <= start < draw.j < n:
            raise ValueError(f"the drawn pair needs {trainable} <= k < j < {n}, got k {start}, j {draw.j}")
        if not isinstance(self.active, Supports) and draw.j not in draw.nodes:
            raise ValueError(f"the junction {draw.j} must be one of the drawn nodes, got {draw.nodes}")
        return [(start, draw.j), (draw.j, n)]

    def _segment(self, grid: list[float], a: int, b: int, draw: Draw, anchored: bool) -> _Rows:
        """The supports, weights and gains of the segment [a, b)."""
        if isinstance(self.active, Supports):
            return self._spread(self.active, grid, a, b, anchored)
        nodes = tuple(node for node in draw.nodes if a <= node < b)
        if not nodes and not isinstance(self.active, Inactive):
            raise ValueError(f"no drawn node in the segment [{a}, {b}), got {draw.nodes}")
        supports = tuple(range(a, b)) if isinstance(self.weights, Euler) else nodes
        gains = tuple(1.0 if node in nodes else None for node in supports)
        return supports, tuple(weigh(self.weights, grid, a, b, supports)), gains

    def _spread(self, active: Supports, grid: list[float], a: int, b: int, anchored: bool) -> _Rows:
        """As `_segment`, for an active set that is given by its supports."""
        if isinstance(self.weights, AdamsBashforth):
            supports = backward_nodes(a, active.order)
        else:
            supports = spread(a, b, active.order)
        gain_of = dict(zip(supports, active.gains(supports), strict=True))
        if isinstance(self.weights, Euler):
            supports = tuple(range(a, b))
        weights = weigh(self.weights, grid, a, b, supports)
        gains = [gain_of.get(node) for node in supports]
        [(supports, _, scaled)] = _rescaled_together([(supports, tuple(weights), tuple(gains))], self.rescale)
        if anchored and not isinstance(self.weights, Euler):
            weights, blended = anchor_weights(weights, scaled, self.weights.anchor, grid[b] - grid[a])
            return supports, tuple(weights), tuple(blended)
        return supports, tuple(weights), scaled


_Rows = tuple[tuple[int, ...], tuple[float, ...], tuple[float | None, ...]]


def _rescaled_together(rows: list[_Rows], rescale: float) -> list[_Rows]:
    """Multiply all gains by one `rescale_factor`, whose totals are taken over all given rows."""
    total = sum(abs(w) for _, weights, _ in rows for w in weights)
    chosen = sum(abs(w) for _, weights, gains in rows for w, g in zip(weights, gains, strict=True) if g is not None)
    f = rescale_factor(rescale, total, chosen)
    return [
        (supports, weights, tuple(None if g is None else g * f for g in gains)) for supports, weights, gains in rows
    ]
