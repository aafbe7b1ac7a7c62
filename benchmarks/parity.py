"""What bf16 costs a gradient, by the sweep and by the K-graph, at the same weights, states and cotangents as in fp32.

Weights and states are rounded to bf16 first, so that only the arithmetic differs. The cotangent is given to both.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from benchmarks.meters import attempt, compare, gradients, tidy
from benchmarks.models import Models
from benchmarks.options import Cell
from benchmarks.problem import Problem, by_graph, by_sweep, problem
from flowbp_ray.surrogate import Cache

SIDES = {"sweep": by_sweep, "k_graph": lambda p: by_graph(p, scored=False)}


def parity(m: Models, cell: Cell) -> dict[str, Any]:
    """Gradients against the sweep's in fp32: the K-graph's in fp32, both in bf16. Leaves the transformer in bf16.

    None stands where memory does not suffice. The reference is kept in host memory.
    """
    m.checkpointing(cell.checkpointing)
    cotangents = problem(m, cell.rows, cell.k, cell.method).cotangents
    m.hold_scoring(False)
    rounded = problem(dataclasses.replace(m, dtype=torch.bfloat16, scoring=None), cell.rows, cell.k, cell.method)
    m.transformer.to(torch.bfloat16)
    reference = None
    found: dict[str, Any] = cell.names()
    for dtype in (torch.float32, torch.bfloat16):
        m.transformer.to(dtype)
        p = dataclasses.replace(_cast(rounded, dtype), cotangents=cotangents)
        for name, side in SIDES.items():
            fits = attempt(lambda side=side, p=p: (side(p), True), m.device)
            label = f"{name}_{'fp32' if dtype == torch.float32 else 'bf16'}"
            if label == "sweep_fp32":
                reference = gradients(m.transformer) if fits else None
            else:
                found[label] = compare(m.transformer, reference) if fits and reference else None
            p.forget()
            tidy(m.device)
    return found


def _cast(p: Problem, dtype: torch.dtype) -> Problem:
    """The same states in `dtype`; the velocities follow their states."""
    cache = Cache(p.cache.sigmas, p.cache.x.to(dtype), p.cache.v.to(dtype))
    return dataclasses.replace(p, cache=cache, states=p.states.to(dtype))
