"""How well the detector's maps fit a claim: a smooth form of the exact verifier's rules.

Cells are taken to be independent. With a[i] = P(the thing in cell i fits part a) = P(shape) P(colour) P(size), of what
is stated, the expected matches are

    E = sum_i a[i]                                           of a part
    E = sum_{i != j} a[i] b[j] sigmoid(beyond[i, j] / SLACK)     of two parts in a relation

where `beyond` is by how many pixels the verifier's rule for positions holds (`flowbp_ray.shapes.world.holds`), and

    score = sum over parts n log(min(E, n) / n)  -  SURPLUS * huber(expected things - things claimed).

It is 0 at best: all that is claimed is there, and nothing else. Everything is summed as logarithms, so that the
gradient of a thing that is all but absent is not lost.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray.rewards.shapes_maps import KINDS, NOTHING, Maps
from flowbp_ray.shapes.combinations import COLOURS
from flowbp_ray.shapes.world import RELATION_COSINE, Claim, Part

SLACK = 1.5  # pixels
SURPLUS = 4.0
_COLOURS = tuple(COLOURS)


def matches(maps: Maps, part: Part) -> Tensor:
    """log P [B, N] of each cell's thing fitting a part."""
    found = maps.kinds[..., KINDS.index(part.shape)]
    if part.colour is not None:
        found = found + maps.colours[..., _COLOURS.index(part.colour)]
    if part.size is not None:
        found = found + F.logsigmoid(maps.large if part.size == "large" else -maps.large)
    return found


def beyond(places: Tensor, relation: str) -> Tensor:
    """By how many pixels cell i's thing is in the relation to cell j's, [B, N, N], from places [B, N, 2].

    For "left of" x[j] - x[i] - cos(60 degrees) * distance, with one pixel in the root, whose gradient is finite at 0.
    """
    to = places[:, None] - places[:, :, None]
    along = {"left of": to[..., 0], "right of": -to[..., 0], "above": to[..., 1], "below": -to[..., 1]}[relation]
    return along - RELATION_COSINE * (to.square().sum(-1) + 1.0).sqrt()


def things(maps: Maps) -> Tensor:
    """Expected number [B] of things, junk among them."""
    return -torch.expm1(maps.kinds[..., NOTHING]).sum(-1)


def agreement(maps: Maps, claim: Claim) -> Tensor:
    """Score [B] of maps (module docstring); at most 0, with finite gradients."""
    wanted = sum(part.count for part in claim.parts)
    each = [matches(maps, part) for part in claim.parts]
    if claim.relation is None:
        filled = [_filled(some.logsumexp(-1), part.count) for some, part in zip(each, claim.parts, strict=True)]
        found = torch.stack(filled).sum(0)
    else:
        pairs = each[0][:, :, None] + each[1][:, None] + F.logsigmoid(beyond(maps.places, claim.relation) / SLACK)
        same = torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device)
        found = _filled(pairs.masked_fill(same, -torch.inf).flatten(1).logsumexp(-1), 1)
    count = things(maps)
    surplus = F.huber_loss(count, torch.full_like(count, wanted), reduction="none")
    return found - SURPLUS * surplus


def _filled(log_expected: Tensor, count: int) -> Tensor:
    """count * log(min(E, count) / count) of log E [B]."""
    most = math.log(count)
    return count * (log_expected.clamp(max=most) - most)
