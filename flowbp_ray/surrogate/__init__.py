"""Surrogate trajectories for reward backpropagation; torch only.

Names are imported on first use, so that a process that only reads the `Plan` of an item (the emulated actors of
`bench`) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowbp_ray.surrogate.cache import (
        Cache,
        append_dims,
        gather_states,
        gather_targets,
        gather_velocities,
        places,
        renoise,
    )

    from .active import Inactive, LastNodes, LateBiased, Strided, Supports
    from .backward import SweepReport, endpoint, sweep
    from .method import Draw, Method, TermBudget
    from .methods import METHODS
    from .plan import Branch, Plan, PosteriorMean, Renoised, Sample, Segment, Similarity, Term
    from .quadrature import AdamsBashforth, Euler, Lagrange, Uniform
    from .segments import DirichletPair, MidpointJPair, MidpointPair, OneSegment, UniformPair
    from .targets import EarlyStop, LatePosterior, WithRenoised
    from .trajectory import Velocity, rollout
    from .weighting import keep, omega, residuals

__all__ = [
    "METHODS",
    "AdamsBashforth",
    "Branch",
    "Cache",
    "DirichletPair",
    "Draw",
    "EarlyStop",
    "Euler",
    "Inactive",
    "Lagrange",
    "LastNodes",
    "LateBiased",
    "LatePosterior",
    "Method",
    "MidpointJPair",
    "MidpointPair",
    "OneSegment",
    "Plan",
    "PosteriorMean",
    "Renoised",
    "Sample",
    "Segment",
    "Similarity",
    "Strided",
    "Supports",
    "SweepReport",
    "Term",
    "TermBudget",
    "Uniform",
    "UniformPair",
    "Velocity",
    "WithRenoised",
    "append_dims",
    "endpoint",
    "gather_states",
    "gather_targets",
    "gather_velocities",
    "keep",
    "omega",
    "places",
    "renoise",
    "residuals",
    "rollout",
    "sweep",
]

_MODULES = (
    "active",
    "backward",
    "cache",
    "method",
    "methods",
    "plan",
    "quadrature",
    "segments",
    "targets",
    "trajectory",
    "weighting",
)


def __getattr__(name: str) -> Any:
    """Import all of the package's names when the first of them is accessed."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in (importlib.import_module(f".{part}", __name__) for part in _MODULES):
        globals().update({known: getattr(module, known) for known in __all__ if hasattr(module, known)})
    return globals()[name]
