"""Small random velocity networks and caches in fp64, and hypothesis strategies over the design space."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import strategies as st
from torch import Tensor, nn

from flowbp_ray.backbones.sigmas import static_shift
from flowbp_ray.surrogate import (
    AdamsBashforth,
    Branch,
    Cache,
    DirichletPair,
    EarlyStop,
    Euler,
    Lagrange,
    LastNodes,
    LateBiased,
    LatePosterior,
    Method,
    MidpointJPair,
    MidpointPair,
    OneSegment,
    Plan,
    PosteriorMean,
    Renoised,
    Sample,
    Segment,
    Similarity,
    Strided,
    Supports,
    Uniform,
    UniformPair,
    WithRenoised,
    renoise,
)
from flowbp_ray.surrogate.trajectory import rollout

WIDTH = 3


class Network(nn.Module):
    """v(x, node, row): two tanh layers, conditioned on the node and on the sample."""

    def __init__(self, samples: int, steps: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        double = {"dtype": torch.float64, "generator": generator}
        self.a = nn.Parameter(torch.randn(6, WIDTH, **double))
        self.b = nn.Parameter(torch.randn(WIDTH, 6, **double))
        self.register_buffer("node", torch.randn(steps, 6, **double))
        self.register_buffer("row", torch.randn(samples, 6, **double))

    def forward(self, x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        assert len(x) == len(node) == len(row)
        return torch.tanh(x @ self.a.T + self.node[node] + self.row[row]) @ self.b.T

    def gradient(self) -> Tensor:
        """All parameter gradients as one vector; a parameter without one counts as zero."""
        rows = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]
        return torch.cat([row.flatten() for row in rows]).clone()


def make_cache(network: Network, samples: int, steps: int, renoised: int, seed: int) -> Cache:
    """A rollout in fp64, with `renoised` fresh states."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, WIDTH, dtype=torch.float64, generator=generator)
    trajectory = rollout(network, noise, static_shift(steps).double())
    cache = Cache(trajectory.sigmas, trajectory.x, trajectory.v)
    if not renoised:
        return cache
    y = renoise(cache, torch.randn(renoised, samples, WIDTH, dtype=torch.float64, generator=generator))
    row = torch.arange(samples)
    with torch.no_grad():
        v_y = torch.stack([network(state, torch.full_like(row, steps - 1), row) for state in y])
    return replace(cache, y=y, v_y=v_y)


TARGETS = [Sample(), LatePosterior(3), EarlyStop(0.4), WithRenoised(2)]
ACTIVES = [
    LateBiased(3, 2.0),
    Strided(3),
    LastNodes(2),
    Supports(1, "start", 1),
    Supports(3, "midpoint", 2, 0.25),
    Supports(4, "all", 3, 0.5),
]
WEIGHTS = [Euler(), Lagrange(), Lagrange(0.4), Uniform(), Uniform(0.7), AdamsBashforth(), AdamsBashforth(0.6)]
SEGMENTS = [
    OneSegment(),
    UniformPair(),
    UniformPair(3),
    UniformPair(start="window"),
    DirichletPair(),
    DirichletPair(max_j_rev=3, start="window"),
    MidpointPair(),
    MidpointJPair(),
]


def every_method() -> list[Method]:
    """All combinations of the axis values above that are legal, with both couplings, tails and rescales."""
    found = []
    for target in TARGETS:
        for active in ACTIVES:
            for weights in WEIGHTS:
                for segments in SEGMENTS:
                    for coupling, rescale, tail in ((0.0, 0.5, 1.0), (0.6, 0.0, 0.6)):
                        try:
                            method = Method(
                                target, active, weights, segments, coupling, rescale, tail, Similarity(0.1, 5.0)
                            )
                            method.check(8)
                        except ValueError:
                            continue
                        found.append(method)
    return found


@st.composite
def written_plans(draw: st.DrawFn, steps: int, branches: int) -> Plan:
    """A hand-written plan: any targets, supports (also before a segment), weights, gains and couplings."""
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    found: list[Branch] = []
    for b in range(branches):
        if b > 0 and rng.random() < 0.5:
            segment = Segment(steps - 1, steps, (steps - 1,), (float(rng.normal()),), (1.0,))
            found.append(Branch(Renoised(b - 1), (segment,)))
            continue
        end = steps if rng.random() < 0.5 else int(rng.integers(2, steps + 1))
        target = Sample() if end == steps and rng.random() < 0.7 else PosteriorMean(end - 1)
        start = int(rng.integers(0, end - 1))
        cuts = [start, end] if rng.random() < 0.3 else [start, int(rng.integers(start + 1, end)), end]
        pairs = list(pairwise(cuts))
        segments = tuple(_segment(rng, a, z, force=i == len(pairs) - 1) for i, (a, z) in enumerate(pairs))
        alpha = float(rng.choice([0.0, 0.3, 1.0])) if len(segments) == 2 else 0.0
        found.append(Branch(target, segments, alpha))
    return Plan(steps, tuple(found))


def _segment(rng: np.random.Generator, start: int, stop: int, force: bool) -> Segment:
    count = int(rng.integers(1, stop + 1))
    supports = tuple(int(i) for i in rng.permutation(stop)[:count])
    if start not in supports and rng.random() < 0.6:
        supports = (start, *supports)
    gains = [float(rng.normal()) if rng.random() < 0.6 else None for _ in supports]
    if force and gains[0] is None:
        gains[0] = 0.7
    weights = tuple(float(w) for w in rng.normal(size=len(supports)))
    return Segment(start, stop, supports, weights, tuple(gains))


def dynamic_grid(steps: int, mu: float) -> Tensor:
    """Sigmas [steps + 1] of FLUX's schedulers: even steps, shifted by mu."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=mu)
    sigmas: Tensor = scheduler.sigmas
    return sigmas
