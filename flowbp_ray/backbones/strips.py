"""Maps of features computed a few rows at a time, with their gradient: the values are those of the whole map.

A convolution needs `halo` rows above and below a strip, and nothing else of the map. What does look at all of it is a
group norm, y = γ (x − μ) / σ + β with μ and σ over a group's channels and all pixels. So μ and σ are found first, strip
by strip, and then every strip is normalised by them. Backward computes each strip again, which gives ∂L/∂x for fixed μ
and σ, and ∂L/∂μ and ∂L/∂σ² summed over the strips; what these owe to each pixel (∂μ/∂x = 1/n, ∂σ²/∂x = 2 (x − μ) / n)
is added at the end. Nothing is approximated, so there is no seam; what differs from the whole map is rounding.

Held at a time are the maps that go in and come out, their gradients, and what one strip needs in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Local = Callable[..., Tensor]
"""(normalise, *strips of the maps) -> the strip of the result; `normalise` is to be applied to the first of them."""


@dataclass(frozen=True)
class Cut:
    """How maps [..., H, W] are cut: `rows` of them at a time, seen with `halo` more on each side, if there are any.

    The result has `scale` rows for each one.
    """

    rows: int
    halo: int = 1
    scale: int = 1

    def spans(self, height: int) -> Iterator[tuple[slice, slice, slice]]:
        """(rows of the input to look at, rows of what comes of them to keep, rows of the result that these are)."""
        for top in range(0, height, self.rows):
            bottom = min(height, top + self.rows)
            first, last = max(0, top - self.halo), min(height, bottom + self.halo)
            kept = slice((top - first) * self.scale, (bottom - first) * self.scale)
            yield slice(first, last), kept, slice(top * self.scale, bottom * self.scale)


def in_strips(local: Local, cut: Cut, norm: nn.GroupNorm | None, *maps: Tensor) -> Tensor:
    """local(normalise, *maps) for maps [B, C, ..., H, W] of the same H, a few rows at a time; differentiable once.

    norm: the group norm of the first map, which `normalise` applies; None: it changes nothing. Parameters of `norm` and
    of `local` get no gradient.
    """
    result: Tensor = _InStrips.apply(local, cut, norm, *maps)
    return result


class _InStrips(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Local, cut: Cut, norm: nn.GroupNorm | None, *maps: Tensor) -> Tensor:
        moments = () if norm is None else _moments(maps[0], norm.num_groups, cut.rows)
        factors = () if norm is None else _factors(norm, *moments)
        height, result = maps[0].shape[-2], None
        for seen, kept, place in cut.spans(height):
            strip = local(_normalise(*factors), *(x[..., seen, :] for x in maps))[..., kept, :]
            if result is None:
                result = strip.new_empty(*strip.shape[:-2], height * cut.scale, strip.shape[-1])
            result[..., place, :] = strip
        ctx.local, ctx.cut, ctx.norm = local, cut, norm
        ctx.save_for_backward(*maps, *moments)
        assert result is not None
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        saved: list[Tensor] = list(ctx.saved_tensors)
        maps, moments = (saved, []) if ctx.norm is None else (saved[:-2], saved[-2:])
        leaves: tuple[Tensor, ...] = ()
        if ctx.norm is not None:
            leaves = tuple(f.requires_grad_(True) for f in _factors(ctx.norm, *moments))
        gradients = [torch.zeros_like(x) for x in maps]
        owed = [torch.zeros_like(leaf) for leaf in leaves]
        for seen, kept, place in ctx.cut.spans(maps[0].shape[-2]):
            pieces = [x[..., seen, :].detach().requires_grad_(True) for x in maps]
            with torch.enable_grad():
                strip = ctx.local(_normalise(*leaves), *pieces)[..., kept, :]
            found = torch.autograd.grad(strip, [*pieces, *leaves], cotangent[..., place, :])
            for total, part in zip(gradients, found[: len(maps)], strict=True):
                total[..., seen, :] += part
            for total, part in zip(owed, found[len(maps) :], strict=True):
                total += part
        if ctx.norm is not None:
            _add_moments(gradients[0], maps[0], ctx.norm, moments[0], moments[1], owed, ctx.cut.rows)
        return None, None, None, *gradients


def _normalise(*factors: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> x · factor + offset, computed in fp32 at least; x -> x without factors."""
    if not factors:
        return lambda x: x
    factor, offset = factors
    return lambda x: (x.to(factor.dtype) * factor + offset).to(x.dtype)


def _moments(x: Tensor, groups: int, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, G, 1, 1] of each group of x [B, C, H, W], in fp32 at least, from those of its strips."""
    parts = []
    for strip in x.split(rows, dim=-2):
        grouped = strip.unflatten(1, (groups, -1)).to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0)
        parts.append((mean, variance, strip.shape[-2] / x.shape[-2]))
    mean = torch.stack([m * share for m, _, share in parts]).sum(0)
    variance = torch.stack([(v + (m - mean).square()) * share for m, v, share in parts]).sum(0)
    return mean[..., None, None], variance[..., None, None]


def _factors(norm: nn.GroupNorm, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """(γ / σ, β − μ γ / σ), [B, C, 1, 1] each: the group norm as one product and one sum."""
    scale = torch.rsqrt(variance + norm.eps)  # [B, G, 1, 1]
    each = norm.num_channels // norm.num_groups
    factor = (scale * norm.weight.to(scale.dtype).view(norm.num_groups, each, 1)).flatten(1, 2)[..., None]
    offset = norm.bias.to(scale.dtype).view(-1, 1, 1) - mean.repeat_interleave(each, dim=1) * factor
    return factor, offset


def _add_moments(
    gradient: Tensor, x: Tensor, norm: nn.GroupNorm, mean: Tensor, variance: Tensor, owed: list[Tensor], rows: int
) -> None:
    """Add to the gradient of x what it owes to μ and σ². owed: ∂L/∂(factor, offset) of `_factors`."""
    moments = [moment.detach().requires_grad_(True) for moment in (mean, variance)]
    with torch.enable_grad():
        factors = _factors(norm, *moments)
    of_mean, of_variance = torch.autograd.grad(factors, moments, owed)
    count = x[0].numel() // norm.num_groups
    for part, total in zip(x.split(rows, dim=-2), gradient.split(rows, dim=-2), strict=True):
        grouped = part.unflatten(1, (norm.num_groups, -1)).to(mean.dtype)
        pull = (of_mean[..., None] + 2 * of_variance[..., None] * (grouped - mean[..., None])) / count
        total += pull.flatten(1, 2).to(total.dtype)
