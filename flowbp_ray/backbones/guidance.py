"""Velocity closures with classifier-free guidance: v = v_neg + g·(v_cond − v_neg) (2207.12598).

The surrogate asks for `velocity(x [R, ...], node [R], row [R])`; these functions bind a transformer, a sigma grid and
the rows' conditioning to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowbp_ray.backbones.base import Backbone, Conditioning

VelocityFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_velocity(
    backbone: Backbone,
    transformer: nn.Module,
    sigmas: Tensor,
    conditioning: Conditioning,
    negative: Conditioning,
    guidance: float,
    observe: Callable[[Tensor], None] | None = None,
) -> VelocityFn:
    """The guided velocity, conditional and negative rows in one forward; one branch alone where guidance is 1.

    observe: is given what `trained_velocity` with a detached negative returns at the same state, for the drift meter.
    """

    def velocity(x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        sigma = sigmas[node]
        cond = {name: tensor[row] for name, tensor in conditioning.items()}
        if guidance == 1.0:
            v = backbone.predict(transformer, x, sigma, cond)
            if observe is not None:
                observe(v)
            return v
        both = {name: torch.cat([tensor, negative[name][row]]) for name, tensor in cond.items()}
        v = backbone.predict(transformer, torch.cat([x, x]), torch.cat([sigma, sigma]), both)
        v_cond, v_neg = v.chunk(2)
        if observe is not None:
            observe(guidance * v_cond)
        return v_neg + guidance * (v_cond - v_neg)

    return velocity


def trained_velocity(
    backbone: Backbone,
    transformer: nn.Module,
    sigmas: Tensor,
    conditioning: Conditioning,
    negative: Conditioning,
    guidance: float,
    detach_negative: bool,
) -> VelocityFn:
    """What a learner differentiates. With a detached negative branch that is g·v_cond: the rest has no gradient.

    Its *value* is then not the guided velocity; a vector–Jacobian product does not need the value.
    """
    if not detach_negative or guidance == 1.0:
        return full_velocity(backbone, transformer, sigmas, conditioning, negative, guidance)

    def velocity(x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        cond = {name: tensor[row] for name, tensor in conditioning.items()}
        return guidance * backbone.predict(transformer, x, sigmas[node], cond)

    return velocity
