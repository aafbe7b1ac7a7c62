"""Surrogate trajectories for reward backpropagation; torch only.

Names are imported on first use: a `Plan` travels with every item, and who only reads it (the emulated actors of
`bench`) needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowbp_ray.surrogate.active import LastNodes, LateBiased, Strided, Supports
    from flowbp_ray.surrogate.segments import DirichletPair, MidpointJPair, MidpointPair, OneSegment, UniformPair

    from .backward import SweepReport, endpoint, sweep
    from .cache import Cache, gather_states, gather_velocities, places, renoise, targets
    from .methods import METHODS, Draw, EarlyStop, LatePosterior, Method, TermBudget, WithRenoised
    from .plan import Branch, Plan, PosteriorMean, Renoised, Sample, Segment, Similarity, Term
    from .quadrature import AdamsBashforth, Euler, Lagrange, Uniform
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
    "WithRenoised",
    "endpoint",
    "gather_states",
    "gather_velocities",
    "keep",
    "omega",
    "places",
    "renoise",
    "residuals",
    "sweep",
    "targets",
]

_MODULES = ("active", "backward", "cache", "methods", "plan", "quadrature", "weighting")


def __getattr__(name: str) -> Any:
    """All of the package's names, as soon as one of them is wanted."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in (importlib.import_module(f".{part}", __name__) for part in _MODULES):
        globals().update({known: getattr(module, known) for known in __all__ if hasattr(module, known)})
    return globals()[name]
