"""The seven named methods as data, with their published hyper-parameters as arguments (FlowBP, arXiv 2606.11075)."""

from __future__ import annotations

from collections.abc import Callable

from .active import Inactive, LastNodes, LateBiased, Strided, Supports
from .method import Method
from .plan import Similarity
from .quadrature import Lagrange
from .segments import DirichletPair, UniformPair
from .targets import EarlyStop, LatePosterior, WithRenoised


def refl(last: int = 11) -> Method:
    """ReFL: the last node before a late posterior mean."""
    return Method(target=LatePosterior(last), active=LastNodes(1))


def draft_lv(n: int = 2) -> Method:
    """DRaFT-LV: the last step, and n renoised copies of it."""
    return Method(target=WithRenoised(n), active=LastNodes(1))


def drtune(k: int = 3, stop: float = 0.4) -> Method:
    """DRTune: strided nodes up to an early-stopped posterior mean."""
    return Method(target=EarlyStop(stop), active=Strided(k))


def leapalign(alpha: float = 0.3, tau: float = 0.1) -> Method:
    """LeapAlign: two leaps, k to j and j to N, weighted by similarity."""
    return Method(
        active=Supports(order=1, mode="start", max_active=1),
        weights=Lagrange(),
        segments=UniformPair(),
        coupling=alpha,
        similarity=Similarity(tau),
    )


def flowbp_sparse(k: int = 4, late_bias: float = 1.0, rescale: float = 0.5, tail: float = 1.0) -> Method:
    """FlowBP-Sparse: k late-biased nodes of the cached trajectory."""
    return Method(active=LateBiased(k, late_bias), rescale=rescale, tail_ratio=tail)


def flowbp_bridge(
    k: int = 5, late_bias: float = 4.0, rescale: float = 0.0, alpha: float = 0.5, tail: float = 1.0
) -> Method:
    """FlowBP-Bridge: late-biased nodes on both sides of a junction."""
    return Method(
        active=LateBiased(k, late_bias),
        segments=UniformPair(start="window"),
        coupling=alpha,
        rescale=rescale,
        tail_ratio=tail,
    )


def flowbp_lagrange(
    order: int = 3,
    tau: float = 0.2,
    rescale: float = 0.0,
    tail: float = 1.0,
    alpha: float = 0.1,
    max_j_rev: int | None = 10,
) -> Method:
    """FlowBP-Lagrange: two Lagrange connectors, weighted by similarity."""
    return Method(
        active=Supports(order, mode="midpoint", max_active=2, scale=0.25),
        weights=Lagrange(),
        segments=DirichletPair(2.5, 6.0, 2.0, max_j_rev),
        coupling=alpha,
        rescale=rescale,
        tail_ratio=tail,
        similarity=Similarity(tau),
    )


def sampling() -> Method:
    """No surrogate: the samples are only drawn and scored, for terms without gradient (see `nft`)."""
    return Method(active=Inactive())


METHODS: dict[str, Callable[..., Method]] = {
    factory.__name__: factory
    for factory in (refl, draft_lv, drtune, leapalign, flowbp_sparse, flowbp_bridge, flowbp_lagrange)
}
