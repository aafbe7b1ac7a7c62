"""Measurements during a learner's sweep: the drift, the distance to the base model, and values that are not finite.

    drift[b] = mean over elements of |Σ_i h[i] · (v_theta(x[i]) − v_cached[i])|,  i over the active nodes of sample b
    base_distance[b] = mean over i and elements of (v_theta(x[i]) − v_base(x[i]))²

The velocities compared are those of the branches that the learner runs (g·v_cond with a detached negative branch). At
staleness 0 the drift is the noise floor: the same weights, but other batches in the forward. Where the base has a
guidance of its own (`flowbp_ray.backbones.guidance.held_velocity`) the distance begins at what that guidance changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowbp_ray.messages import Fault, Item
from flowbp_ray.surrogate import Plan, places
from flowbp_ray.surrogate.trajectory import Velocity


class SweepObserver:
    """The `observe` callback of one sweep over some items. A state counts once, however often it is evaluated.

    What it measures stays on the device of the velocities until it is asked for, so that no forward waits for it.
    """

    def __init__(
        self, items: Sequence[Item], sigmas: Tensor, velocities: Tensor | None = None, base: Tensor | None = None
    ) -> None:
        """velocities, base: cached ones and the base model's at the states [R, ...], sample-major; None: no metric.

        They should be on the device of the velocities that are observed.
        """
        self.rows = [(item, row) for item in items for row in range(item.rows)]
        self.velocities, self.base = velocities, base
        self.h = (sigmas[1:] - sigmas[:-1]).tolist()
        plans: list[Plan] = [item.plans[row] for item, row in self.rows]
        self.places = places(plans)
        self.drift_sum: list[Tensor | None] = [None] * len(plans)
        self.squares: list[list[Tensor]] = [[] for _ in plans]
        self.seen: set[int] = set()
        self.finite: list[Tensor] = []
        self.asked: list[int | None] = []  # the place of each row in `finite`; None: it was seen before

    @torch.no_grad()
    def __call__(self, position: Tensor, v: Tensor) -> None:
        """Add the velocities v [r, ...] of the states `position` [r] int64, which is best on the host."""
        self.finite.append(torch.isfinite(v).flatten(1).all(dim=1))
        for i, place in enumerate(position.tolist()):
            self.asked.append(None if place in self.seen else place)
            if place in self.seen:
                continue
            self.seen.add(place)
            b, node = self.places[place]
            if self.velocities is not None:
                change = self.h[node] * (v[i].float() - self.velocities[place].to(v.device).float())
                before = self.drift_sum[b]
                self.drift_sum[b] = change if before is None else before + change
            if self.base is not None:
                self.squares[b].append((v[i].float() - self.base[place].to(v.device).float()).square().mean())

    def faults(self) -> tuple[Fault, ...]:
        """A fault of each state whose velocity is not finite."""
        finite = torch.cat(self.finite).tolist() if self.finite else []
        bad = [place for place, good in zip(self.asked, finite, strict=True) if place is not None and not good]
        return tuple(self.fault("learner velocity", *self.places[place]) for place in bad)

    def fault(self, what: str, b: int, node: int | None) -> Fault:
        """A fault of sample b, with its step, its sample index and its prompt id."""
        item, row = self.rows[b]
        return Fault(what, item.step, item.samples[row], item.prompt_ids[row], node)

    def drift(self) -> tuple[float, ...]:
        """The drift of each sample; empty if it is not measured."""
        if self.velocities is None:
            return ()
        means = [torch.zeros(()) if a is None else a.abs().mean() for a in self.drift_sum]
        return tuple(torch.stack([mean.to(self.velocities.device) for mean in means]).tolist())

    def base_distance(self) -> tuple[float, ...]:
        """The base distance of each sample; empty if it is not measured."""
        if self.base is None:
            return ()
        return tuple(torch.stack([torch.stack(squares).mean() for squares in self.squares]).tolist())

    def bad_gradients(
        self,
        velocity: Velocity,
        parameters: Sequence[Tensor],
        states: Tensor,
        cotangents: Tensor,
        penalty: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> tuple[Fault, ...]:
        """Find the samples whose gradients are not finite, one state at a time. No gradient is accumulated.

        states [R, ...], cotangents [rows, branches, ...] and penalty: as in `sweep`.
        """
        bad: dict[tuple[int, int], Fault] = {}
        for place, (b, node) in enumerate(self.places):
            at = [torch.tensor([i], device=states.device) for i in (node, b)]
            v = velocity(states[place : place + 1], *at)
            cotangent = cotangents[b].sum(0)
            if penalty is not None:
                cotangent = cotangent + penalty(torch.tensor([place], device=states.device), v.detach())[0]
            found = torch.autograd.grad((v.float() * cotangent).sum(), parameters, allow_unused=True)
            norm = torch.nn.utils.get_total_norm([g for g in found if g is not None])
            if not torch.isfinite(norm):  # not the values alone: the squares in the norm may overflow
                bad.setdefault((b, node), self.fault("gradient", b, node))
        return tuple(bad.values())
