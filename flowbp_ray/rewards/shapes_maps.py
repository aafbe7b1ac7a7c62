"""The network behind `shapes_detector`: what lies in each cell of an 8 x 8 grid over a picture of the shapes domain."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowbp_ray.rewards.towers import Residual
from flowbp_ray.shapes.combinations import COLOURS, SHAPES
from flowbp_ray.shapes.world import CANVAS

SIDE = 8  # cells a side
CELL = CANVAS // SIDE  # pixels a side of a cell: less than half the least distance of two things
KINDS = ("nothing", *SHAPES, "junk")  # junk: what the exact verifier reads as UNKNOWN, in shape or colour
NOTHING, JUNK = 0, len(KINDS) - 1
SURE = 4.0  # initial logit of "nothing": most cells are empty


@dataclass(frozen=True)
class Maps:
    """What a picture shows, cell by cell; N = 64 cells, row by row.

    kinds: log-probabilities [B, N, 8] of `KINDS` for the thing whose centre lies in the cell. colours:
    log-probabilities [B, N, 8] of the palette, if it is a shape. large: logits [B, N] of its radius being above the
    boundary of sizes. places: its centre [B, N, 2] as (x, y) in pixels.
    """

    kinds: Tensor
    colours: Tensor
    large: Tensor
    places: Tensor

    def row(self, index: int) -> Maps:
        """One picture's maps, with a batch of one."""
        rows = slice(index, index + 1)
        return Maps(self.kinds[rows], self.colours[rows], self.large[rows], self.places[rows])


class Detector(nn.Module):
    """Residual convolutions from [B, 3, 64, 64] down to [B, W, 8, 8], and one linear map for each cell.

    widths: channels at strides 2, 4 and 8. depths: residual blocks at each.
    """

    middles: Tensor  # [64, 2]: (x, y) of each cell's middle, in pixels

    def __init__(self, widths: list[int], depths: list[int]) -> None:
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1)]
        stages += [Residual(widths[0]) for _ in range(depths[0])]
        for (before, after), depth in zip(pairwise(widths), depths[1:], strict=True):
            stages += [nn.Conv2d(before, after, 2, stride=2), *(Residual(after) for _ in range(depth))]
        self.stages = nn.Sequential(*stages, nn.GroupNorm(widths[-1] // 8, widths[-1]), nn.GELU())
        self.head = nn.Conv2d(widths[-1], len(KINDS) + len(COLOURS) + 3, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        bias = torch.zeros(len(KINDS) + len(COLOURS) + 3)
        bias[NOTHING] = SURE
        self.head.bias = nn.Parameter(bias)
        line = CELL * (torch.arange(SIDE) + 0.5)
        down, across = torch.meshgrid(line, line, indexing="ij")
        self.register_buffer("middles", torch.stack([across, down], -1).reshape(-1, 2), persistent=False)

    def forward(self, images: Tensor) -> Maps:
        """The maps of images [B, 3, 64, 64] in 0..1, in fp32 or wider."""
        out = self.head(self.stages(images * 2.0 - 1.0)).flatten(2).transpose(1, 2)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        kinds, colours, large, offsets = out.split([len(KINDS), len(COLOURS), 1, 2], dim=-1)
        middles = self.middles.to(out)
        return Maps(F.log_softmax(kinds, -1), F.log_softmax(colours, -1), large[..., 0], middles + CELL * offsets)
