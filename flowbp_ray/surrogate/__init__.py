"""Surrogate trajectories for reward backpropagation; torch only."""

from .active import (
    DirichletPair,
    LastNodes,
    LateBiased,
    MidpointJPair,
    MidpointPair,
    OneSegment,
    Strided,
    Supports,
    UniformPair,
)
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
