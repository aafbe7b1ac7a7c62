"""What a learner sees in passing, forward by forward: how far the states have aged, and values that are not finite.

    drift[b] = mean over elements of |Σ_i h[i] · (v_theta(x[i]) − v_cached[i])|,  i over the active nodes of sample b

The velocities compared are those of the branches that the learner runs (with a detached negative g·v_cond). At
staleness 0 the drift is the noise floor: the same weights, other batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowbp_ray.messages import Fault, Item
from flowbp_ray.surrogate import Plan


class Watch:
    """The `observe` of one sweep over some items. Each state counts once, however often it is evaluated."""

    def __init__(self, items: Sequence[Item], sigmas: Tensor, velocities: Tensor | None = None) -> None:
        """velocities: cached at the states, [R, ...], sample-major; None: no meter."""
        self.rows = [(item, row) for item in items for row in range(item.rows)]
        self.velocities = velocities
        self.h = (sigmas[1:] - sigmas[:-1]).tolist()
        plans: list[Plan] = [item.plans[row] for item, row in self.rows]
        self.places = [(b, node) for b, plan in enumerate(plans) for node, _ in plan.states]  # of each state
        self.moved: list[Tensor | None] = [None] * len(plans)
        self.seen: set[int] = set()
        self.faults: list[Fault] = []

    @torch.no_grad()
    def __call__(self, position: Tensor, v: Tensor) -> None:
        """position [r] int64 into the states, v [r, ...] as computed there."""
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
                before = self.moved[b]
                self.moved[b] = change if before is None else before + change

    def fault(self, what: str, b: int, node: int | None) -> Fault:
        """A fault of sample b, by the names that a person knows it by."""
        item, row = self.rows[b]
        return Fault(what, item.step, item.samples[row], item.prompt_ids[row], node)

    def drift(self) -> tuple[float, ...]:
        """One number per sample; empty without the meter."""
        if self.velocities is None:
            return ()
        return tuple(0.0 if m is None else float(m.abs().mean()) for m in self.moved)
