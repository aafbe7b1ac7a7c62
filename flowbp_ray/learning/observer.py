"""Measurements during a learner's sweep: the drift, the distance to the base model, and values that are not finite.

    drift[b] = mean over elements of |Σ_i h[i] · (v_theta(x[i]) − v_cached[i])|,  i over the active nodes of sample b
    base_distance[b] = mean over i and elements of (v_theta(x[i]) − v_base(x[i]))²

The velocities compared are those of the branches that the learner runs (g·v_cond with a detached negative branch). At
staleness 0 the drift is the noise floor: the same weights, but other batches in the forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowbp_ray.messages import Fault, Item
from flowbp_ray.surrogate import Plan, places


class SweepObserver:
    """The `observe` callback of one sweep over some items. A state counts once, however often it is evaluated."""

    def __init__(
        self, items: Sequence[Item], sigmas: Tensor, velocities: Tensor | None = None, base: Tensor | None = None
    ) -> None:
        """velocities, base: cached ones and the base model's at the states [R, ...], sample-major; None: no metric."""
        self.rows = [(item, row) for item in items for row in range(item.rows)]
        self.velocities, self.base = velocities, base
        self.h = (sigmas[1:] - sigmas[:-1]).tolist()
        plans: list[Plan] = [item.plans[row] for item, row in self.rows]
        self.places = places(plans)
        self.drift_sum: list[Tensor | None] = [None] * len(plans)
        self.squares: list[list[Tensor]] = [[] for _ in plans]
        self.seen: set[int] = set()
        self.faults: list[Fault] = []

    @torch.no_grad()
    def __call__(self, position: Tensor, v: Tensor) -> None:
        """Add the velocities v [r, ...] of the states `position` [r] int64."""
        finite = torch.isfinite(v).flatten(1).all(dim=1).tolist()
        for i, place in enumerate(position.tolist()):
            if place in self.seen:
                continue
            self.seen.add(place)
            b, node = self.places[place]
            if not finite[i]:
                self.faults.append(self.fault("learner velocity", b, node))
            if self.velocities is not None:
                change = self.h[node] * (v[i].float() - self.velocities[place].to(v.device).float())
                before = self.drift_sum[b]
                self.drift_sum[b] = change if before is None else before + change
            if self.base is not None:
                self.squares[b].append((v[i].float() - self.base[place].to(v.device).float()).square().mean())

    def fault(self, what: str, b: int, node: int | None) -> Fault:
        """A fault of sample b, with its step, its sample index and its prompt id."""
        item, row = self.rows[b]
        return Fault(what, item.step, item.samples[row], item.prompt_ids[row], node)

    def drift(self) -> tuple[float, ...]:
        """The drift of each sample; empty if it is not measured."""
        if self.velocities is None:
            return ()
        return tuple(0.0 if a is None else float(a.abs().mean()) for a in self.drift_sum)

    def base_distance(self) -> tuple[float, ...]:
        """The base distance of each sample; empty if it is not measured."""
        if self.base is None:
            return ()
        return tuple(float(torch.stack(squares).mean()) for squares in self.squares)
