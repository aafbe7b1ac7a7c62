"""The axis `active`: which nodes carry gradient, and how they are drawn (FlowBP, arXiv 2606.11075).

All functions take the random generator as an argument. `n` is the number of nodes of the grid, W = `window` the number
of trainable nodes at its end, s = n − W the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .plan import axis, check_positive


@axis
class LateBiased:
    """k nodes without replacement, with probability ∝ (i+1)^bias (FlowBP-Sparse, FlowBP-Bridge)."""

    k: int = 4
    bias: float = 1.0
    kind: Literal["late_biased"] = "late_biased"

    def __post_init__(self) -> None:
        check_positive("active steps k", self.k)

    def pick(self, start: int, stop: int, k: int, origin: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Draw k nodes of [start, stop), sorted; i counts from `origin`."""
        # An exponential race: the k earliest arrivals at rates `weight` are a weighted draw without replacement.
        weight = (np.arange(start, stop) - origin + 1.0) ** self.bias
        arrival = -np.log1p(-rng.random(stop - start)) / weight
        return tuple(sorted(start + int(i) for i in np.argsort(arrival, kind="stable")[:k]))


@axis
class Strided:
    """k nodes at stride max(1, length // k) from a uniformly drawn start (DRTune, arXiv 2405.00760)."""

    k: int = 3
    kind: Literal["strided"] = "strided"

    def __post_init__(self) -> None:
        check_positive("active steps k", self.k)

    def pick(self, start: int, stop: int, k: int, origin: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Draw k nodes of [start, stop); `origin` is not used."""
        if k == 0:
            return ()
        stride = max(1, (stop - start) // k)
        offset = int(rng.integers(0, stop - start - (k - 1) * stride))
        return tuple(start + offset + i * stride for i in range(k))


@axis
class LastNodes:
    """The last k nodes; k = 1 at a posterior mean is ReFL (arXiv 2304.05977)."""

    k: int = 1
    kind: Literal["last"] = "last"

    def __post_init__(self) -> None:
        check_positive("active steps k", self.k)

    def pick(self, start: int, stop: int, k: int, origin: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Return the last k nodes of [start, stop); nothing is drawn."""
        return tuple(range(stop - k, stop))


@axis
class Inactive:
    """No node: the trajectory is only sampled, and nothing is backpropagated through it (see `nft`)."""

    k: Literal[0] = 0
    kind: Literal["inactive"] = "inactive"

    def pick(self, start: int, stop: int, k: int, origin: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Return no node; nothing is drawn."""
        return ()


@axis
class Supports:
    """`order` supports per segment, of which the first, the first two or all are active, but at most `max_active`.

    mode: "start", "midpoint" or "all". The first support has gain 1, the other active ones `scale` (FlowBP-Lagrange;
    order 1 is LeapAlign, arXiv 2604.15311).
    """

    order: int = 3
    mode: Literal["start", "midpoint", "all"] = "midpoint"
    max_active: int = 2
    scale: float = 0.25
    kind: Literal["supports"] = "supports"

    def __post_init__(self) -> None:
        check_positive("order", self.order)
        check_positive("max_active", self.max_active)
        if self.mode not in ("start", "midpoint", "all"):
            raise ValueError(f"mode must be start, midpoint or all, got {self.mode}")

    @property
    def count(self) -> int:
        """The number of active supports of a segment that has at least so many."""
        return min(self.order, self.max_active, {"start": 1, "midpoint": 2, "all": self.order}[self.mode])

    def gains(self, supports: Sequence[int]) -> list[float | None]:
        """The gain of each support: 1 for the first, `scale` for the other active ones, None for the cached ones."""
        return [None if i >= self.count else self.scale if i else 1.0 for i in range(len(supports))]


Picks = LateBiased | Strided | LastNodes | Inactive
Active = LateBiased | Strided | LastNodes | Inactive | Supports


def pick_one(active: Picks, n: int, window: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Draw the active nodes of a single segment, all of them if it is shorter than k; late bias counts from node 0."""
    return active.pick(n - window, n, min(active.k, window), 0, rng)


def pick_two(active: Picks, start: int, j: int, n: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Draw k active nodes, split over [start, j) and [j, n) in proportion to length, at least one each.

    j is always active. Late bias counts from `start` in the first part and from j + 1 in the second (FlowBP-Bridge).
    """
    length = n - start
    k = min(active.k, length)
    k_first = min(max(1, round(k * (j - start) / length)), k - 1)
    first = active.pick(start, j, k_first, start, rng)
    return (*first, j, *active.pick(j + 1, n, k - k_first - 1, j + 1, rng))
