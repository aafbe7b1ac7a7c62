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
from flowbp_ray.backbones.registry import BACKBONES
from flowbp_ray.config.schema import RunConfig
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
    if not one_branch(backbone, guidance):
        branches = _both_branches(backbone, transformer, sigmas, conditioning, negative)

        def guided(x: Tensor, node: Tensor, row: Tensor) -> Tensor:
            v_cond, v_neg = branches(x, node, row)
            v = backbone.guide(v_cond, v_neg, guidance)
            if observe is not None:
                observe(guidance * v_cond if backbone.linear_guidance else v)
            return v

        return guided
    sigmas, conditioning, _ = _beside(backbone, transformer, sigmas, conditioning, {})

    def velocity(x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        v = backbone.predict(transformer, x, sigmas[node], _rows(backbone, conditioning, row, guidance))
        if observe is not None:
            observe(v)
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


def held_velocity(
    backbone: Backbone,
    transformer: nn.Module,
    sigmas: Tensor,
    conditioning: Conditioning,
    negative: Conditioning,
    guidance: float,
    detach_negative: bool,
    held: float,
) -> Velocity:
    """Return the base's velocity that a penalty compares a learner's `trained_velocity` at `guidance` with.

    held: h, the guidance of the base. At the learner's own, g, this is the base's `trained_velocity`; at another one
    the base's guided velocity. With a detached negative the learner's value is g·v_cond, which lacks (1 − g)·v_neg:
    this is taken to be the base's, and moved to the other side of the difference, so that the result is

        v_neg + h·(v_cond − v_neg) − (1 − g)·v_neg = h·v_cond + (g − h)·v_neg
    """
    if held == guidance:
        return trained_velocity(backbone, transformer, sigmas, conditioning, negative, guidance, detach_negative)
    if not _negative_held(backbone, guidance, detach_negative):
        return full_velocity(backbone, transformer, sigmas, conditioning, negative, held)
    branches = _both_branches(backbone, transformer, sigmas, conditioning, negative)

    def velocity(x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        v_cond, v_neg = branches(x, node, row)
        return held * v_cond + (guidance - held) * v_neg

    return velocity


def held_branches(backbone: Backbone, guidance: float, detach_negative: bool, held: float) -> int:
    """How many branches `held_velocity` evaluates at a guidance `held` other than `guidance`."""
    return 2 if _negative_held(backbone, guidance, detach_negative) or not one_branch(backbone, held) else 1


def held_guidance(config: RunConfig) -> tuple[float, float]:
    """(g, h): the guidance of the velocity that a run learns, and that of the base which its penalty holds it to."""
    guidance, penalty = config.backbone.guidance, config.learners.base_penalty
    learned = guidance if config.rewards.differentiable else forward_guidance(BACKBONES[config.backbone.name], guidance)
    return learned, learned if penalty is None or penalty.guidance is None else penalty.guidance


def distilled_guidance(config: RunConfig) -> float | None:
    """The base's guidance that a run distils by its penalty; None where it does not."""
    (learned, held), penalty = held_guidance(config), config.learners.base_penalty
    return held if penalty is not None and penalty.weight > 0 and held != learned else None


def forward_guidance(backbone: Backbone | type[Backbone], guidance: float) -> float:
    """The guidance at which terms without gradient learn: none, or the run's where the model takes it as an input.

    What is learned is the conditional velocity, whatever guidance the samples were drawn with (see `surrogate.nft`).
    """
    return guidance if backbone.embedded_guidance else 1.0


def one_branch(backbone: Backbone, guidance: float) -> bool:
    """Whether the velocity is a single forward without a negative branch."""
    return backbone.embedded_guidance or guidance == 1.0


def _negative_held(backbone: Backbone, guidance: float, detach_negative: bool) -> bool:
    """Whether `trained_velocity` is g·v_cond, without the negative branch that the guided velocity has."""
    return detach_negative and backbone.linear_guidance and not one_branch(backbone, guidance)


def _both_branches(
    backbone: Backbone, transformer: nn.Module, sigmas: Tensor, conditioning: Conditioning, negative: Conditioning
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function of states [R, ...], nodes and rows that returns (v_cond, v_neg), by one forward if they may share it.

    For families without embedded guidance.
    """
    if backbone.joint_branches:
        conditioning, negative = _equally_long(conditioning, negative)
    sigmas, conditioning, negative = _beside(backbone, transformer, sigmas, conditioning, negative)

    def branches(x: Tensor, node: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        sigma = sigmas[node]
        cond, neg = (_rows(backbone, branch, row, 1.0) for branch in (conditioning, negative))
        if not backbone.joint_branches:
            v_cond, v_neg = (backbone.predict(transformer, x, sigma, branch) for branch in (cond, neg))
            return v_cond, v_neg
        both = {name: torch.cat([tensor, neg[name]]) for name, tensor in cond.items()}
        v_both = backbone.predict(transformer, torch.cat([x, x]), torch.cat([sigma, sigma]), both)
        v_cond, v_neg = v_both.chunk(2)
        return v_cond, v_neg

    return branches


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
