"""The axis `segments`: where a branch's segments begin and end (FlowBP, arXiv 2606.11075)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from .plan import axis, check_positive

Start = Literal["k", "window"]


@axis
class OneSegment:
    """A single segment over the trainable window."""

    kind: Literal["one"] = "one"


@axis
class UniformPair:
    """Two distinct reversed indices, uniform in [1, W]; the larger is k_rev = n − k, the smaller j_rev = n − j.

    With `max_j_rev`: j_rev uniform in [1, min(max_j_rev, W−1)], then k_rev uniform in [j_rev+1, W].
    start: the first segment starts at k, or at the first node of the trainable window (FlowBP-Bridge).
    """

    max_j_rev: int | None = None
    start: Start = "k"
    kind: Literal["uniform"] = "uniform"
    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.max_j_rev is not None:
            check_positive("max_j_rev", self.max_j_rev)

    def draw(self, n: int, window: int, rng: np.random.Generator) -> tuple[int, int]:
        """Draw (k, j) with k < j."""
        if self.max_j_rev is None:
            first = int(rng.integers(1, window + 1))
            other = int(rng.integers(1, window))
            other += other >= first
            return n - max(first, other), n - min(first, other)
        j_rev = int(rng.integers(1, min(self.max_j_rev, window - 1) + 1))
        return n - int(rng.integers(j_rev + 1, window + 1)), n - j_rev


@axis
class DirichletPair:
    """Lengths (l0, l1, l2) ~ Dirichlet(a, b, c)·W, rounded; j_rev = l0 + 1, k_rev = l0 + l1 + 1, as published."""

    a: float = 2.5
    b: float = 6.0
    c: float = 2.0
    max_j_rev: int | None = None
    start: Start = "k"
    kind: Literal["dirichlet"] = "dirichlet"
    least: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if min(self.a, self.b, self.c) <= 0:
            raise ValueError(
                f"dirichlet needs a, b, c above 0 (published: 2.5, 6, 2), got {self.a}, {self.b}, {self.c}"
            )
        if self.max_j_rev is not None and self.max_j_rev < 2:
            raise ValueError(f"max_j_rev must be at least 2 with dirichlet, got {self.max_j_rev}")

    def draw(self, n: int, window: int, rng: np.random.Generator) -> tuple[int, int]:
        """Draw (k, j) with k < j < n − 1."""
        l0, l1, _ = self.lengths(rng.dirichlet((self.a, self.b, self.c)).tolist(), window)
        return n - (l0 + l1 + 1), n - (l0 + 1)

    def lengths(self, shares: Sequence[float], window: int) -> tuple[int, int, int]:
        """Round shares·W to integers >= 1 that sum to W, correcting the largest; then cap l0 at max_j_rev − 1."""
        l = [round(share * window) for share in shares]
        l[int(np.argmax(shares))] += window - sum(l)
        l = [max(1, length) for length in l]
        while sum(l) > window:
            l[int(np.argmax(l))] -= 1
        if self.max_j_rev is not None and l[0] > self.max_j_rev - 1:
            l[2] += l[0] - (self.max_j_rev - 1)
            l[0] = self.max_j_rev - 1
        return l[0], l[1], l[2]


@axis
class MidpointPair:
    """k_rev uniform in [2, W], j = ⌊(k + N)/2⌋."""

    start: Start = "k"
    kind: Literal["midpoint"] = "midpoint"
    least: ClassVar[int] = 2

    def draw(self, n: int, window: int, rng: np.random.Generator) -> tuple[int, int]:
        """Draw (k, j) with k < j."""
        k = n - int(rng.integers(2, window + 1))
        return k, (k + n) // 2


@axis
class MidpointJPair:
    """j_rev uniform in [1, W−1], k = ⌊(s + j)/2⌋."""

    start: Start = "k"
    kind: Literal["midpoint_j"] = "midpoint_j"
    least: ClassVar[int] = 2

    def draw(self, n: int, window: int, rng: np.random.Generator) -> tuple[int, int]:
        """Draw (k, j) with k < j."""
        j = n - int(rng.integers(1, window))
        return (n - window + j) // 2, j


Segments = OneSegment | UniformPair | DirichletPair | MidpointPair | MidpointJPair
