"""The learner's part for terms without gradient: one forward and one backward at each noised sample.

`surrogate.nft` has the loss. The step's is the mean over the global batch and over the times of a row:

    Σ_b weight · factor[b] / B · 1/T · Σ_t loss(v_θ(x_t); r[b])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowbp_ray.messages import Fault, Item, Optimality, Rollout, unpack
from flowbp_ray.surrogate import append_dims
from flowbp_ray.surrogate.backward import SweepReport
from flowbp_ray.surrogate.nft import ForwardStates, forward_loss, forward_states
from flowbp_ray.surrogate.trajectory import Velocity
from flowbp_ray.utils import random

Backward = Callable[[Tensor, bool], None]


@dataclass(frozen=True)
class ForwardSettings:
    """beta, clip: β and c of the loss. penalty: weight of the distance to the base model, 0 for none.

    at_once: rows of a forward.
    """

    beta: float
    clip: float
    penalty: float
    at_once: int


class ForwardSweep:
    """The noised samples of a rank's rollouts, what is learned from them in a step, and what was seen on the way.

    What it measures stays on the device of the velocities until it is asked for, so that no forward waits for it.
    """

    def __init__(self, rollouts: Sequence[Rollout], sigmas: Tensor, optimality: Optimality, settings: ForwardSettings):
        """rollouts: those of the rank's items, with `finished` and `old`. sigmas: the grid [N+1]."""
        self.items = [rollout.item for rollout in rollouts]
        self.where = [(item, row) for item in self.items for row in range(item.rows)]
        self.states = _states(rollouts, sigmas)
        self.old = torch.cat([unpack(r.old) for r in rollouts if r.old is not None])
        base = [unpack(r.base) for r in rollouts if r.base is not None]
        self.base = torch.cat(base) if base and not any(plan.states for plan in self.items[0].plans) else None
        self.optimality, self.settings = optimality, settings
        self.per_row = len(self.items[0].times[0])
        active = [b for b, r in enumerate(optimality.rows) if not math.isnan(r)]
        self.real = [b * self.per_row + k for b in active for k in range(self.per_row)]
        self.order = self.real + [self.real[0] if self.real else 0] * (optimality.slots - len(self.real))
        self.values: list[
            Tensor
        ] = []  # per forward [4, r]: loss, squares to the old policy, signal, squares to the base
        self.finite: list[Tensor] = []

    def run(self, velocity: Velocity, scale: Tensor, backward: Backward) -> SweepReport:
        """Add the gradient. scale: [rows], multiplies each row's loss; on the learner's device.

        velocity: of the branch that is learned. backward(loss, last): as in `sweep`; the last call is the step's last.
        """
        size = self.settings.at_once
        for start in range(0, len(self.order), size):
            places = self.order[start : start + size]
            live = [start + i < len(self.real) for i in range(len(places))]
            self._forward(velocity, places, live, scale, backward, start + size >= len(self.order))
        return SweepReport(len(self.values), len(self.order), len(self.order) - len(self.real))

    def _forward(
        self,
        velocity: Velocity,
        places: Sequence[int],
        live: Sequence[bool],
        scale: Tensor,
        backward: Backward,
        last: bool,
    ) -> None:
        """One forward and one backward at the states `places`; those that are not live only pad."""
        at = torch.tensor(places)
        row, node = torch.tensor([self.states.places[place] for place in places]).unbind(1)
        r = torch.tensor([self.optimality.rows[b] if real else 0.5 for b, real in zip(row.tolist(), live, strict=True)])
        there = [self.states.x[at], self.old[at], self.states.target[at], self.states.t[at], r, row, node]
        x, old, target, t, r, row, node = (value.to(scale.device, non_blocking=True) for value in there)
        mask = torch.tensor(live, dtype=torch.float32).to(scale.device, non_blocking=True)
        v = velocity(x, node, row)
        found = forward_loss(v, old, target, t, r, self.settings.beta, self.settings.clip)
        share = mask * scale[row] / self.per_row
        cotangent = append_dims(share * self.optimality.weight, v.dim()) * found.cotangent
        seen, away = v.detach().to(found.cotangent.dtype), torch.zeros_like(found.value)
        if self.base is not None:
            distance = seen - self.base[at].to(scale.device, non_blocking=True).to(seen.dtype)
            away = distance.square().flatten(1).mean(dim=1)
            slope = 2.0 * self.settings.penalty / distance[0].numel() * share
            cotangent = cotangent + append_dims(slope, v.dim()) * distance
        backward((v.to(cotangent.dtype) * cotangent).sum(), last)
        moved = (seen - old.to(seen.dtype)).square().flatten(1).mean(dim=1)
        signal = found.by_optimality.square().flatten(1).sum(dim=1) / self.per_row**2
        self.values.append(torch.stack([found.value * self.optimality.weight, moved, signal, away]))
        self.finite.append(torch.isfinite(seen).flatten(1).all(dim=1))

    def per_sample(self) -> tuple[tuple[float, ...], ...]:
        """Per row: its loss, the squared distance to the old policy's velocities, the squared norm of d cotangent/d r,
        and the squared distance to the base's: means over the times, of the third the sum. NaN for a row left out."""
        rows = len(self.where)
        result = torch.full((4, rows), math.nan)
        if self.real:
            found = torch.cat(self.values, dim=1)[:, : len(self.real)].float().cpu().unflatten(1, (-1, self.per_row))
            active = [place // self.per_row for place in self.real[:: self.per_row]]
            result[:, active] = found.mean(dim=2) * torch.tensor([1.0, 1.0, float(self.per_row), 1.0])[:, None]
        return tuple(tuple(line) for line in result.tolist())

    def faults(self) -> tuple[Fault, ...]:
        """A fault of each state whose velocity is not finite."""
        good = torch.cat(self.finite)[: len(self.real)].tolist() if self.finite else []
        places = [self.states.places[place] for place, fine in zip(self.real, good, strict=True) if not fine]
        return tuple(self._fault(b, node) for b, node in places)

    def _fault(self, b: int, node: int) -> Fault:
        item, row = self.where[b]
        return Fault("learner velocity", item.step, item.samples[row], item.prompt_ids[row], node)


def _states(rollouts: Sequence[Rollout], sigmas: Tensor) -> ForwardStates:
    """The states of all rollouts, as the samplers had them; the places count rows through."""
    parts: list[ForwardStates] = []
    offset = 0
    places: list[tuple[int, int]] = []
    for rollout in rollouts:
        item: Item = rollout.item
        assert rollout.finished is not None
        x0 = unpack(rollout.finished)
        shape = (len(item.times[0]), *x0.shape[1:])
        eps = random.normal(shape, item.seed, "forward", item.step, item.samples)
        parts.append(forward_states(x0, eps, sigmas, item.times))
        places += [(offset + b, node) for b, node in parts[-1].places]
        offset += item.rows
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("x", "target", "t")]
    return ForwardStates(joined[0], joined[1], joined[2], tuple(places))
