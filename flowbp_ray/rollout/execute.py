"""The execution of an `Item` by a sampler, as pure functions of their arguments."""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flowbp_ray.messages import Fault, Item, Packed, Rollout, RolloutReport, pack
from flowbp_ray.surrogate import (
    Cache,
    append_dims,
    gather_states,
    gather_targets,
    gather_velocities,
    keep,
    omega,
    places,
    renoise,
    residuals,
)
from flowbp_ray.surrogate.nft import ForwardStates, forward_states
from flowbp_ray.surrogate.trajectory import Velocity, rollout
from flowbp_ray.utils import random


class VelocityRecorder:
    """Records, for the drift meter, what a learner would differentiate at each evaluation of the sampler's velocity."""

    def __init__(self) -> None:
        self.velocities: list[Tensor] = []

    def __call__(self, v: Tensor) -> None:
        self.velocities.append(v)

    def replaced(self, cache: Cache) -> Cache:
        """Return the cache with the recorded velocities, on the host: those of the rollout, then the fresh states'."""
        steps = len(cache.v)
        path, fresh = self.velocities[:steps], self.velocities[steps:]
        return replace(cache, v=torch.stack(path).cpu(), v_y=torch.stack(fresh).cpu() if fresh else None)


def run_item(
    item: Item,
    velocity: Velocity,
    sigmas: Tensor,
    noise: Tensor,
    recorder: VelocityRecorder | None = None,
    base: Velocity | None = None,
    forward: Velocity | None = None,
) -> tuple[RolloutReport, Rollout, Packed]:
    """Roll out a training item; return its report, the learner's part of the rollout, and the targets.

    noise: x[0] [rows, ...] on the device and in the dtype of the model. The results are on the host.
    recorder: the `observe` of `velocity` (see `full_velocity`), for the drift meter; None: no meter.
    base: what a penalty holds a learner's velocity to (`held_velocity`); None: not computed.
    forward: the velocity that terms without gradient learn, at the samples noised again at `item.times`.
    The targets [rows, branches, ...] are the reward's input. A row with a value that is not finite becomes zeros, has
    a fault in the report and is not kept.
    """
    started = time.perf_counter()
    cache = _cache(item, velocity, sigmas, noise)
    faults = _faults(item, cache)
    if faults:
        cache = _without(cache, _bad(item, faults))
    kept_states, found = gather_states(item.plans, cache), tuple(places(item.plans))
    base_velocities = finished = old = None
    if forward is not None:
        finished, again = pack(cache.x[-1]), _noised(item, cache)
        values, old_faults = _at_states(item, forward, again.x, again.places, noise.device, "old velocity")
        old, faults = pack(values), faults + old_faults
        if not found:  # there is no surrogate, whose states a base penalty would look at
            kept_states, found = again.x, again.places
    if base is not None:
        values, base_faults = _at_states(item, base, kept_states, found, noise.device, "base velocity")
        base_velocities, faults = pack(values), faults + base_faults
    bad, states = _bad(item, faults), pack(gather_states(item.plans, cache))
    target = pack(gather_targets(item.plans, cache))
    velocities = None if recorder is None else pack(gather_velocities(item.plans, recorder.replaced(cache)))
    distances = residuals(item.plans, cache)
    kept = keep(item.plans, distances) & ~bad
    report = RolloutReport(
        step=item.step,
        index=item.index,
        version=item.version,
        omega=tuple(omega(item.plans, cache).tolist()),
        residuals=tuple((float(a), float(b)) for a, b in distances.tolist()),
        kept=tuple(bool(k) for k in kept.tolist()),
        item_bytes=len(pickle.dumps(item, pickle.HIGHEST_PROTOCOL)),
        state_bytes=states.nbytes,
        velocity_bytes=0 if velocities is None else velocities.nbytes,
        base_bytes=0 if base_velocities is None else base_velocities.nbytes,
        target_bytes=target.nbytes,
        seconds=time.perf_counter() - started,
        load_seconds=0.0,
        faults=faults,
        forward_bytes=0 if finished is None or old is None else finished.nbytes + old.nbytes,
    )
    return report, Rollout(item, states, velocities, base_velocities, finished, old), target


def finish_item(velocity: Velocity, sigmas: Tensor, noise: Tensor) -> Packed:
    """Roll out an evaluation item from its noise and return its finished latents [rows, ...]."""
    return pack(rollout(velocity, noise, sigmas).x[-1])


@torch.no_grad()
def _cache(item: Item, velocity: Velocity, sigmas: Tensor, noise: Tensor) -> Cache:
    """Roll out as far as the plans need, and draw the fresh states that they name (DRaFT-LV) with their velocities.

    The model runs on the noise's device; the cache is on the host, from where its parts are sent.
    """
    path = rollout(velocity, noise, sigmas, max(plan.stop for plan in item.plans))
    cache = Cache(sigmas, path.x.cpu(), path.v.cpu())
    fresh = item.plans[0].renoised
    if not fresh:
        return cache
    eps = random.normal((fresh, *noise.shape[1:]), item.seed, "renoise", item.step, item.samples)  # [rows, n, ...]
    y = renoise(cache, eps.transpose(0, 1))
    row = torch.arange(item.rows, device=noise.device)
    node = torch.full_like(row, item.num_steps - 1)
    return replace(cache, y=y, v_y=torch.stack([velocity(state.to(noise), node, row).cpu() for state in y]))


def _noised(item: Item, cache: Cache) -> ForwardStates:
    """The finished samples, noised again with the noise of the item's keys."""
    shape = (len(item.times[0]), *cache.x.shape[2:])
    eps = random.normal(shape, item.seed, "forward", item.step, item.samples)
    return forward_states(cache.x[-1], eps, cache.sigmas, item.times)


@torch.no_grad()
def _at_states(
    item: Item,
    velocity: Velocity,
    states: Tensor,
    found: Sequence[tuple[int, int]],
    device: torch.device,
    what: str,
) -> tuple[Tensor, tuple[Fault, ...]]:
    """Velocities at the states [R, ...], `item.rows` at a time; zeros and a fault `what` where they are not finite.

    found: (row, node) of each state.
    """
    row, node = torch.tensor(found).unbind(1)
    parts = zip(states.split(item.rows), node.split(item.rows), row.split(item.rows), strict=True)
    v = torch.cat([velocity(*(tensor.to(device, non_blocking=True) for tensor in part)) for part in parts]).cpu()
    bad = ~torch.isfinite(v).flatten(1).all(dim=1)
    first = dict(reversed([found[i] for i in bad.nonzero().flatten().tolist()]))  # row -> its first bad node
    faults = [Fault(what, item.step, item.samples[b], item.prompt_ids[b], first[b]) for b in sorted(first)]
    return v.masked_fill(append_dims(bad, v.dim()), 0.0), tuple(faults)


def _bad(item: Item, faults: Sequence[Fault]) -> Tensor:
    """The mask [rows] bool of the rows with a fault."""
    return torch.tensor([any(f.sample == sample for f in faults) for sample in item.samples])


def _faults(item: Item, cache: Cache) -> tuple[Fault, ...]:
    """A fault for each row with a value that is not finite; it names the first node with such a velocity."""
    velocities = cache.v if cache.v_y is None else torch.cat([cache.v, cache.v_y])
    bad = ~torch.isfinite(velocities).flatten(2).all(dim=2)  # [N (+ fresh), rows]
    bad[-1] |= ~torch.isfinite(cache.x[-1]).flatten(1).all(dim=1)
    faults = []
    for row in bad.any(dim=0).nonzero().flatten().tolist():
        node = min(int(bad[:, row].int().argmax()), cache.num_steps - 1)  # a fresh state is evaluated at the last node
        faults.append(Fault("velocity", item.step, item.samples[row], item.prompt_ids[row], node))
    return tuple(faults)


def _without(cache: Cache, bad: Tensor) -> Cache:
    """Set the bad rows to zero, so that only finite values are sent."""

    def clean(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.masked_fill(append_dims(bad[None], values.dim()), 0.0)

    x, v = clean(cache.x), clean(cache.v)
    assert x is not None and v is not None
    return replace(cache, x=x, v=v, y=clean(cache.y), v_y=clean(cache.v_y))
