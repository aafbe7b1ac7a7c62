"""What a sampler does with an `Item`, and how the items of a step are made. Pure functions of their arguments."""

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
from flowbp_ray.surrogate.trajectory import Velocity, rollout
from flowbp_ray.utils import random


class VelocityRecorder:
    """Keeps what the drift meter compares with: of each call of a velocity what a learner would differentiate there."""

    def __init__(self) -> None:
        self.velocities: list[Tensor] = []

    def __call__(self, v: Tensor) -> None:
        self.velocities.append(v)

    def replaced(self, cache: Cache) -> Cache:
        """The cache with these velocities, on the host: N of the rollout, then those of the fresh states."""
        steps = cache.num_steps
        path, fresh = self.velocities[:steps], self.velocities[steps:]
        return replace(cache, v=torch.stack(path).cpu(), v_y=torch.stack(fresh).cpu() if fresh else None)


def run_item(
    item: Item,
    velocity: Velocity,
    sigmas: Tensor,
    noise: Tensor,
    recorder: VelocityRecorder | None = None,
    base: Velocity | None = None,
) -> tuple[RolloutReport, Rollout, Packed]:
    """Roll out a training item; keep what its plans name. Returns the report, the learner's part, and the targets.

    noise: x[0] [rows, ...] on the device and in the dtype of the model; what comes back is on the host.
    recorder: which `velocity` calls each time (`full_velocity`'s `observe`), for the drift meter; None: no meter.
    base: the velocity that a learner would differentiate before any training; None: not wanted.
    targets: [rows, branches, ...]: what the reward sees. Rows with a value that is not finite become zeros, carry a
    fault and are not kept.
    """
    started = time.perf_counter()
    cache = _cache(item, velocity, sigmas, noise)
    faults = _faults(item, cache)
    if faults:
        cache = _without(cache, _bad(item, faults))
    kept_states, base_velocities = gather_states(item.plans, cache), None
    if base is not None:
        values, base_faults = _at_states(item, base, kept_states, noise.device)
        base_velocities, faults = pack(values), faults + base_faults
    bad, states = _bad(item, faults), pack(kept_states)
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
    )
    return report, Rollout(item, states, velocities, base_velocities), target


def finish_item(velocity: Velocity, sigmas: Tensor, noise: Tensor) -> Packed:
    """The finished latents [rows, ...] of an evaluation item from its noise, without a cache."""
    return pack(rollout(velocity, noise, sigmas).x[-1])


@torch.no_grad()
def _cache(item: Item, velocity: Velocity, sigmas: Tensor, noise: Tensor) -> Cache:
    """Roll out, and where the plans name fresh states (DRaFT-LV) draw those and evaluate the last velocity there.

    The model runs where the noise is; the cache is on the host, where it is cut up and sent from.
    """
    path = rollout(velocity, noise, sigmas)
    cache = Cache(sigmas, path.x.cpu(), path.v.cpu())
    fresh = item.plans[0].renoised
    if not fresh:
        return cache
    eps = random.normal((fresh, *noise.shape[1:]), item.seed, "renoise", item.step, item.samples)  # [rows, n, ...]
    y = renoise(cache, eps.transpose(0, 1))
    row = torch.arange(item.rows, device=noise.device)
    node = torch.full_like(row, item.num_steps - 1)
    return replace(cache, y=y, v_y=torch.stack([velocity(state.to(noise), node, row).cpu() for state in y]))


@torch.no_grad()
def _at_states(item: Item, base: Velocity, states: Tensor, device: torch.device) -> tuple[Tensor, tuple[Fault, ...]]:
    """The base's velocities at the states [R, ...], `item.rows` at a time; zeros and a fault where not finite."""
    found = places(item.plans)
    row, node = torch.tensor(found).unbind(1)
    parts = zip(states.split(item.rows), node.split(item.rows), row.split(item.rows), strict=True)
    v = torch.cat([base(*(tensor.to(device) for tensor in part)).cpu() for part in parts])
    bad = ~torch.isfinite(v).flatten(1).all(dim=1)
    first = dict(reversed([found[i] for i in bad.nonzero().flatten().tolist()]))  # row -> its first bad node
    faults = [Fault("base velocity", item.step, item.samples[b], item.prompt_ids[b], first[b]) for b in sorted(first)]
    return v.masked_fill(append_dims(bad, v.dim()), 0.0), tuple(faults)


def _bad(item: Item, faults: Sequence[Fault]) -> Tensor:
    """Which rows have a fault, [rows] bool."""
    return torch.tensor([any(f.sample == sample for f in faults) for sample in item.samples])


def _faults(item: Item, cache: Cache) -> tuple[Fault, ...]:
    """Per row with a value that is not finite: the first node whose velocity is bad."""
    velocities = cache.v if cache.v_y is None else torch.cat([cache.v, cache.v_y])
    bad = ~torch.isfinite(velocities).flatten(2).all(dim=2)  # [N (+ fresh), rows]
    bad[-1] |= ~torch.isfinite(cache.x[-1]).flatten(1).all(dim=1)
    faults = []
    for row in bad.any(dim=0).nonzero().flatten().tolist():
        node = min(int(bad[:, row].int().argmax()), cache.num_steps - 1)  # a fresh state is evaluated at the last node
        faults.append(Fault("velocity", item.step, item.samples[row], item.prompt_ids[row], node))
    return tuple(faults)


def _without(cache: Cache, bad: Tensor) -> Cache:
    """Zeros in the bad rows, so that nothing that is not finite travels."""

    def clean(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.masked_fill(append_dims(bad[None], values.dim()), 0.0)

    x, v = clean(cache.x), clean(cache.v)
    assert x is not None and v is not None
    return replace(cache, x=x, v=v, y=clean(cache.y), v_y=clean(cache.v_y))
