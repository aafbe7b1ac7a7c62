"""What cannot work is refused with the name of the key and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from flowbp_ray.surrogate import (
    METHODS,
    AdamsBashforth,
    Branch,
    DirichletPair,
    Draw,
    EarlyStop,
    Lagrange,
    LastNodes,
    LateBiased,
    LatePosterior,
    Method,
    Plan,
    PosteriorMean,
    Sample,
    Segment,
    Similarity,
    Supports,
    UniformPair,
    WithRenoised,
    gather_states,
    gather_targets,
    sweep,
)
from flowbp_ray.surrogate.quadrature import lagrange
from flowbp_ray.utils.random import stream
from tests.surrogate.networks import Network, every_method, make_cache

SIGMAS = [1 - i / 8 for i in range(9)]
WHOLE = Segment(0, 8, (3,), (-1.0,), (1.0,))

REFUSED: list[tuple[str, Callable[[], object]]] = [
    ("active steps k must be in [1, 16], got 20", lambda: METHODS["flowbp_sparse"](20).check(16)),
    ("active steps k must be in [1, 4], got 5", lambda: Method(active=LateBiased(5), tail_ratio=0.5).check(8)),
    ("active steps k must be at least 1, got 0", lambda: LateBiased(0)),
    ("active steps k must be at least 2 with two segments, got 1", lambda: METHODS["flowbp_bridge"](1)),
    ("last must be in [1, 8], got 11", lambda: METHODS["refl"](11).check(8)),
    ("last must be at least 1, got 0", lambda: LatePosterior(0)),
    ("ratio must be in (0, 1], got 1.5", lambda: EarlyStop(1.5)),
    ("ratio must be above 0.25 with 2 steps, got 0.1", lambda: Method(EarlyStop(0.1), LastNodes(1)).check(2)),
    ("n must be at least 1 (or write target: {kind: sample}), got 0", lambda: WithRenoised(0)),
    ("coupling must be in [0, 1], got 1.5", lambda: METHODS["leapalign"](alpha=1.5)),
    ("coupling needs two segments: write a (k, j) draw in segments, or coupling: 0", lambda: Method(coupling=0.5)),
    ("tail_ratio must be in (0, 1], got 0", lambda: Method(tail_ratio=0)),
    ("draws must be per_batch or per_sample, got each", lambda: Method(draws="each")),  # type: ignore[arg-type]
    ("tau must be above 0", lambda: METHODS["leapalign"](tau=0.0)),
    ("max_distance must be above 0, or null for no bound, got -1", lambda: Similarity(0.1, -1)),
    ("anchor must be in [0, 1] (1 is no blend with the leap), got 2", lambda: Lagrange(2)),
    ("anchor below 1 needs two segments", lambda: Method(weights=Lagrange(0.5))),
    ("write weights: lagrange otherwise", lambda: Method(weights=AdamsBashforth())),
    (
        "reaches before the trainable window: write tail_ratio: 1 or mode: start",
        lambda: Method(active=Supports(), weights=AdamsBashforth(), tail_ratio=0.5).check(8),
    ),
    ("mode must be start, midpoint or all, got end", lambda: Supports(mode="end")),  # type: ignore[arg-type]
    ("order must be at least 1, got 0", lambda: Supports(order=0)),
    ("max_j_rev must be at least 2 with dirichlet, got 1", lambda: DirichletPair(max_j_rev=1)),
    ("dirichlet needs a, b, c above 0", lambda: DirichletPair(0.0)),
    ("max_j_rev must be at least 1, got 0", lambda: UniformPair(0)),
    ("segments dirichlet needs 3 trainable nodes, got 2", lambda: METHODS["flowbp_lagrange"]().check(2)),
    ("num_steps must be at least 1, got 0", lambda: Method().check(0)),
    ("the drawn pair needs 0 <= k < j < 8, got k 5, j 5", lambda: METHODS["leapalign"]().build(SIGMAS, Draw(k=5, j=5))),
    ("active nodes must be in [0, 8), got [1, 8]", lambda: Method().build(SIGMAS, Draw(nodes=(1, 8)))),
    ("the junction 4 must be one of the drawn nodes", lambda: METHODS["flowbp_bridge"]().build(SIGMAS, Draw(j=4))),
    ("the drawn end must be in [0, 7], got 8", lambda: METHODS["refl"](3).build(SIGMAS, Draw(end=8))),
    ("no drawn node in the segment [0, 8)", lambda: Method().build(SIGMAS, Draw())),
    ("0 <= start < stop, got start 3, stop 3", lambda: Segment(3, 3, (0,), (1.0,), (1.0,))),
    ("as many weights and gains as supports", lambda: Segment(0, 3, (0,), (1.0, 2.0), (1.0,))),
    ("supports of a segment must be distinct", lambda: Segment(0, 3, (0, 0), (1.0, 2.0), (1.0, 1.0))),
    ("supports must be in [0, stop) = [0, 3), got (3,)", lambda: Segment(0, 3, (3,), (1.0,), (1.0,))),
    ("one or two segments, got 3", lambda: Branch(Sample(), (WHOLE,) * 3)),
    ("coupling needs two segments; write coupling: 0, got 0.5", lambda: Branch(Sample(), (WHOLE,), 0.5)),
    ("segments must meet: the first stops at 8, the last starts at 0", lambda: Branch(Sample(), (WHOLE, WHOLE))),
    ("the last segment must stop at 9", lambda: Plan(9, (Branch(Sample(), (WHOLE,)),))),
    ("a posterior mean's node must be in [0, 7], got 8", lambda: Plan(8, (Branch(PosteriorMean(8), (WHOLE,)),))),
    ("quadrature needs distinct sigmas", lambda: lagrange([0.5, 0.5], 1.0, 0.0)),
]


@pytest.mark.parametrize(("message", "attempt"), REFUSED, ids=[message for message, _ in REFUSED])
def test_refused(message: str, attempt: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        attempt()


def test_sweep_names_what_does_not_fit() -> None:
    network = Network(2, 8, 0)
    cache = make_cache(network, 2, 8, 0, 0)
    plans = [METHODS["flowbp_sparse"](3).plan(cache.sigmas, stream(0, "plan", 0))] * 2
    states, u = gather_states(plans, cache), torch.zeros(2, 1, 3)
    for message, attempt in [
        ("states must be the 6 rows that gather_states gives, got 5", lambda: sweep(network, plans, states[1:], u)),
        (
            "cotangents must be [2, 1, …] (samples, branches), got [2, 3]",
            lambda: sweep(network, plans, states, u[:, 0]),
        ),
        ("terms_per_sample must be at least 3", lambda: sweep(network, plans, states, u, terms_per_sample=2)),
        ("micro_batch and fuse must be at least 1", lambda: sweep(network, plans, states, u, fuse=0)),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            attempt()
    renoised = [METHODS["draft_lv"]().plan(cache.sigmas, stream(0, "plan", 0))] * 2
    with pytest.raises(ValueError, match=re.escape("give the cache its y [n, B, …]")):
        gather_targets(renoised, cache)
    with pytest.raises(ValueError, match="the same number of branches"):
        gather_targets([plans[0], renoised[0]], cache)


def test_pydantic_reads_and_refuses_methods() -> None:
    adapter = TypeAdapter(Method)
    for method in every_method()[::7]:
        assert adapter.validate_python(asdict(method)) == method
    with pytest.raises(ValidationError, match="Unexpected keyword argument"):
        adapter.validate_python({"couplings": 0.1})
    with pytest.raises(ValidationError, match="Unexpected keyword argument"):
        adapter.validate_python({"active": {"kind": "late_biased", "steps": 3}})
    with pytest.raises(ValidationError, match=re.escape("coupling must be in [0, 1], got 2.0")):
        adapter.validate_python({"coupling": 2})
