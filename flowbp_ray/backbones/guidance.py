"""Velocity functions with guidance, for every family; `Backbone` describes how the families differ.

Classifier-free guidance is v = v_neg + g·(v_cond − v_neg) (2207.12598), or the family's own `guide`. With embedded
guidance g is an input of the model and there is one branch. The surrogate calls `velocity(x [R, ...], node [R],
row [R])`; the functions here bind a transformer, a sigma grid and the rows' conditioning to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowbp_ray.backbones.base import Backbone, Conditioning, padded
from flowbp_ray.surrogate.trajectory import Velocity


def full_velocity(
    backbone: Backbone,
    transformer: nn.Module,
    sigmas: Tensor,
    conditioning: Conditioning,
    negative: Conditioning,
    guidance: float,
    observe: Callable[[Tensor], None] | None = None,
) -> Velocity:
    """Return the guided velocity; conditional and negative rows share one forward, unless there is only one branch or
    the family wants them apart (`joint_branches`).

    observe: receives, at each call, the value that `trained_velocity` with a detached negative branch returns at the
    same states, for the drift meter.
    """
    alone = one_branch(backbone, guidance)
    if backbone.joint_branches and not alone:
        conditioning, negative = _equally_long(conditioning, negative)
    sigmas, conditioning, negative = _beside(backbone, transformer, sigmas, conditioning, {} if alone else negative)

    def velocity(x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        sigma, cond = sigmas[node], _rows(backbone, conditioning, row, guidance)
        if alone:
            v = backbone.predict(transformer, x, sigma, cond)
            if observe is not None:
                observe(v)
            return v
        neg = _rows(backbone, negative, row, guidance)
        if backbone.joint_branches:
            both = {name: torch.cat([tensor, neg[name]]) for name, tensor in cond.items()}
            v_both = backbone.predict(transformer, torch.cat([x, x]), torch.cat([sigma, sigma]), both)
            v_cond, v_neg = v_both.chunk(2)
        else:
            v_cond, v_neg = (backbone.predict(transformer, x, sigma, branch) for branch in (cond, neg))
        v = backbone.guide(v_cond, v_neg, guidance)
        if observe is not None:
            observe(guidance * v_cond if backbone.linear_guidance else v)
        return v

    return velocity


def trained_velocity(
    backbone: Backbone,
    transformer: nn.Module,
    sigmas: Tensor,
    conditioning: Conditioning,
    negative: Conditioning,
    guidance: float,
    detach_negative: bool,
) -> Velocity:
    """Return the velocity that a learner differentiates.

    With a detached negative branch it is g·v_cond, because the rest has no gradient. Its *value* is then not the guided
    velocity, but a vector–Jacobian product does not need the value. If guidance is not linear in v_cond, the product
    needs v_neg, which is then computed without gradient.
    """
    if not detach_negative or one_branch(backbone, guidance):
        return full_velocity(backbone, transformer, sigmas, conditioning, negative, guidance)
    unused = backbone.linear_guidance  # then the negative prompt is not moved to the device
    sigmas, conditioning, negative = _beside(backbone, transformer, sigmas, conditioning, {} if unused else negative)

    def velocity(x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        sigma, cond = sigmas[node], _rows(backbone, conditioning, row, guidance)
        if unused:
            return guidance * backbone.predict(transformer, x, sigma, cond)
        with torch.no_grad():
            v_neg = backbone.predict(transformer, x, sigma, _rows(backbone, negative, row, guidance))
        return backbone.guide(backbone.predict(transformer, x, sigma, cond), v_neg, guidance)

    return velocity


def forward_guidance(backbone: Backbone, guidance: float) -> float:
    """The guidance at which terms without gradient learn: none, or the run's where the model takes it as an input.

    What is learned is the conditional velocity, whatever guidance the samples were drawn with (see `surrogate.nft`).
    """
    return guidance if backbone.embedded_guidance else 1.0


def one_branch(backbone: Backbone, guidance: float) -> bool:
    """Whether the velocity is a single forward without a negative branch."""
    return backbone.embedded_guidance or guidance == 1.0


def _beside(
    backbone: Backbone, transformer: nn.Module, sigmas: Tensor, *conditionings: Conditioning
) -> tuple[Tensor, Conditioning, Conditioning]:
    """Move the grid and the conditionings, trimmed, to the transformer's device."""
    device = next(transformer.parameters()).device
    trimmed = [backbone.trim(c) for c in conditionings]
    cond, negative = ({name: _moved(tensor, device) for name, tensor in c.items()} for c in trimmed)
    return sigmas.to(device, non_blocking=True), cond, negative


def _equally_long(conditioning: Conditioning, negative: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Both with zeros up to the longer one's number of text tokens, so that their rows fit in one tensor."""
    longest = {name: max(tensor.shape[1], negative[name].shape[1]) for name, tensor in conditioning.items()}

    def lengthened(name: str, tensor: Tensor) -> Tensor:
        if tensor.stride(0) or tensor.shape[1] == longest[name]:
            return padded(tensor, longest[name])
        return padded(tensor[:1], longest[name]).expand(len(tensor), *(-1 for _ in tensor.shape[1:]))

    return (
        {name: lengthened(name, tensor) for name, tensor in conditioning.items()},
        {name: lengthened(name, tensor) for name, tensor in negative.items()},
    )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to the device without waiting; one row expanded to many is moved once and expanded there."""
    if tensor.dim() and tensor.stride(0) == 0:
        return tensor[:1].to(device, non_blocking=True).expand(tensor.shape)
    return tensor.to(device, non_blocking=True)


def _rows(backbone: Backbone, conditioning: Conditioning, row: Tensor, guidance: float) -> Conditioning:
    """The rows' conditioning, with the guidance [R] where the model takes it as an input.

    Fewer rows than were bound may be shorter than the longest of those. All rows, as in a rollout, were trimmed before.
    """
    cond = {name: tensor[row] for name, tensor in conditioning.items()}
    if cond and len(row) < len(next(iter(conditioning.values()))):
        cond = backbone.trim(cond)
    if backbone.embedded_guidance:
        cond["guidance"] = torch.full((len(row),), guidance, dtype=torch.float32, device=row.device)
    return cond
