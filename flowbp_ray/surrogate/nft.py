"""Negative-aware fine-tuning on the forward process (DiffusionNFT, arXiv 2509.16117), as a cotangent in the velocity.

It learns from scores without gradient. A finished sample x0 is noised again, whatever solver and guidance drew it:

    x_t = (1 − t)·x0 + t·ε,    v = ε − x0
    v⁺ = (1 − β)·v_old + β·v_θ(x_t),    v⁻ = (1 + β)·v_old − β·v_θ(x_t)
    w± = 1 / max(mean|t·(v± − v)|, 1e-5)                                   (no gradient; t·(v − v±) = x_t − t·v± − x0)
    loss(v_θ; r) = c/β · [ r·w⁺·mean((t·(v⁺ − v))²) + (1 − r)·w⁻·mean((t·(v⁻ − v))²) ]

Means are over the elements of a sample. v_old is the velocity of the policy that drew x0, and r in [0, 1] the sample's
optimality: r = ½ + ½·clip(A/c, −1, 1), where A is its score's distance from the mean of its prompt's images in standard
deviations (`flowbp_ray.control.optimality`). The factor c/β is that of the paper's code; with it the pull of the scores
depends on neither, and a larger c holds v_θ closer to v_old. A step's loss is the mean over its rows and the times t of
a row. The gradient that the learner sends through its forward at x_t:

    d loss / d v_θ = 2c·t²/n · [ r·w⁺·(v⁺ − v) − (1 − r)·w⁻·(v⁻ − v) ],    n = elements of a sample
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import append_dims

SMALLEST = 1e-5  # least mean error of a predicted x0 that is divided by


@dataclass(frozen=True, eq=False)
class ForwardLoss:
    """The loss at some states, and its derivatives. All in fp32 (fp64 for fp64 velocities).

    value: [R]. cotangent: d value / d v_θ [R, ...]. by_optimality: d cotangent / d r [R, ...].
    """

    value: Tensor
    cotangent: Tensor
    by_optimality: Tensor


def noised(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t)·x0 + t·ε for x0, eps [R, ...] and t [R]: [R, ...], at least fp32."""
    x0, eps = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (x0, eps))
    t = append_dims(t.to(eps.dtype), eps.dim())
    return (1.0 - t) * x0 + t * eps


def forward_loss(
    v: Tensor, v_old: Tensor, target: Tensor, t: Tensor, r: Tensor, beta: float, clip: float
) -> ForwardLoss:
    """The loss of the module docstring at R states. No gradient flows through the result; nothing waits for a GPU.

    v, v_old, target (ε − x0): [R, ...]. t, r: [R]. beta: β, clip: c.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.no_grad():
        v, v_old, target, t, r = (value.detach().to(v.device, dtype) for value in (v, v_old, target, t, r))
        toward, away = v_old + beta * (v - v_old), v_old - beta * (v - v_old)
        good, value_good = _part(toward - target, t)
        bad, value_bad = _part(away - target, t)
        scale = 2.0 * clip / v[0].numel()
        wide = append_dims(r, v.dim())
        return ForwardLoss(
            clip / beta * (r * value_good + (1.0 - r) * value_bad),
            scale * (wide * good - (1.0 - wide) * bad),
            scale * (good + bad),
        )


def _part(error: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """t²·w·error [R, ...] and w·mean((t·error)²) [R], for error = v± − v [R, ...]."""
    flat = error.flatten(1)
    weight = 1.0 / (t * flat.abs().mean(dim=1)).clamp(min=SMALLEST)
    return append_dims(t.square() * weight, error.dim()) * error, weight * t.square() * flat.square().mean(dim=1)


@dataclass(frozen=True, eq=False)
class ForwardStates:
    """The noised samples of some rows, sample-major: x [R, ...] in the samples' dtype, target ε − x0 [R, ...], t [R].

    places: (row, node) of each state.
    """

    x: Tensor
    target: Tensor
    t: Tensor
    places: tuple[tuple[int, int], ...]


def forward_states(x0: Tensor, eps: Tensor, sigmas: Tensor, times: Sequence[Sequence[int]]) -> ForwardStates:
    """Noise each sample at its nodes. x0: [B, ...]. eps: [B, T, ...]. times: per row, T nodes of the grid [N+1].

    Sampler and learner both call it on the host, so that they get the same bits.
    """
    row = torch.tensor([b for b, nodes in enumerate(times) for _ in nodes], dtype=torch.int64)
    node = torch.tensor([node for nodes in times for node in nodes], dtype=torch.int64)
    t, noise, clean = sigmas.cpu()[node], eps.flatten(0, 1).float(), x0[row].float()
    places = tuple(zip(row.tolist(), node.tolist(), strict=True))
    return ForwardStates(noised(clean, noise, t).to(x0.dtype), noise - clean, t, places)
